#include "xxh3_wide.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define POLYPHASE_WIDE 1
#endif

namespace polyphase {

#if defined(POLYPHASE_WIDE)
namespace {

using xxh3::kSecret;
using xxh3::kSecretBytes;
using xxh3::kStripeBytes;
using xxh3::kStripesPerBlock;

constexpr size_t kAhead = 8 * kStripeBytes;
constexpr int kSwapHalves = 0x4E;  // of each 128 bits: lane i takes what its neighbour read

// Takes all stripes but the last into the eight lanes, mixing them after every sixteenth.
using Accumulate = void (*)(uint64_t* lanes, const unsigned char* data, size_t stripe_count);

__attribute__((target("avx512f"))) void accumulate_avx512(uint64_t* lanes, const unsigned char* data, size_t stripe_count) {
    const __m512i prime = _mm512_set1_epi64(xxh3::kPrime32_1);
    const __m512i mixing = _mm512_loadu_si512(kSecret + kSecretBytes - kStripeBytes);
    __m512i sum = _mm512_loadu_si512(lanes);
    size_t in_block = 0;
    for (size_t stripe = 0; stripe < stripe_count; ++stripe) {
        const unsigned char* at = data + kStripeBytes * stripe;
        _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T0);
        const __m512i word = _mm512_loadu_si512(at);
        const __m512i key = _mm512_xor_si512(word, _mm512_loadu_si512(kSecret + 8 * in_block));
        const __m512i product = _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32));
        sum = _mm512_add_epi64(sum, _mm512_add_epi64(product, _mm512_shuffle_epi32(word, static_cast<_MM_PERM_ENUM>(kSwapHalves))));
        if (++in_block < kStripesPerBlock) continue;
        in_block = 0;
        sum = _mm512_xor_si512(_mm512_xor_si512(sum, _mm512_srli_epi64(sum, 47)), mixing);
        const __m512i high = _mm512_slli_epi64(_mm512_mul_epu32(_mm512_srli_epi64(sum, 32), prime), 32);
        sum = _mm512_add_epi64(_mm512_mul_epu32(sum, prime), high);
    }
    _mm512_storeu_si512(lanes, sum);
}

__attribute__((target("avx2"))) void accumulate_avx2(uint64_t* lanes, const unsigned char* data, size_t stripe_count) {
    const __m256i prime = _mm256_set1_epi64x(xxh3::kPrime32_1);
    auto* stored = reinterpret_cast<__m256i*>(lanes);
    __m256i sums[2] = {_mm256_loadu_si256(stored), _mm256_loadu_si256(stored + 1)};
    size_t in_block = 0;
    for (size_t stripe = 0; stripe < stripe_count; ++stripe) {
        const unsigned char* at = data + kStripeBytes * stripe;
        _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T0);
        ++in_block;
        for (size_t half = 0; half < 2; ++half) {
            const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at) + half);
            const auto* secret = reinterpret_cast<const __m256i*>(kSecret + 8 * (in_block - 1)) + half;
            const __m256i key = _mm256_xor_si256(word, _mm256_loadu_si256(secret));
            const __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
            sums[half] = _mm256_add_epi64(sums[half], _mm256_add_epi64(product, _mm256_shuffle_epi32(word, kSwapHalves)));
        }
        if (in_block < kStripesPerBlock) continue;
        in_block = 0;
        for (size_t half = 0; half < 2; ++half) {
            const auto* mixing = reinterpret_cast<const __m256i*>(kSecret + kSecretBytes - kStripeBytes) + half;
            __m256i sum = _mm256_xor_si256(sums[half], _mm256_srli_epi64(sums[half], 47));
            sum = _mm256_xor_si256(sum, _mm256_loadu_si256(mixing));
            const __m256i high = _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(sum, 32), prime), 32);
            sums[half] = _mm256_add_epi64(_mm256_mul_epu32(sum, prime), high);
        }
    }
    _mm256_storeu_si256(stored, sums[0]);
    _mm256_storeu_si256(stored + 1, sums[1]);
}

Accumulate best() {
    if (__builtin_cpu_supports("avx512f")) return accumulate_avx512;
    return __builtin_cpu_supports("avx2") ? accumulate_avx2 : nullptr;
}

const Accumulate kAccumulate = best();

}  // namespace
#endif

uint64_t xxh3_64_wide(const void* bytes, size_t size) {
#if defined(POLYPHASE_WIDE)
    if (size > 240 && kAccumulate != nullptr) {
        const auto* data = static_cast<const unsigned char*>(bytes);
        uint64_t lanes[8];
        xxh3::begin_lanes(lanes);
        kAccumulate(lanes, data, (size - 1) / kStripeBytes);
        return xxh3::end_lanes(lanes, data, size, kSecret);
    }
#endif
    return xxh3_64(bytes, size, 0);
}

}  // namespace polyphase
