#include "xxh3_wide.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#define POLYPHASE_WIDE 1
#endif

namespace polyphase {
namespace {

using xxh3::kSecret;
using xxh3::kSecretBytes;
using xxh3::kStripeBytes;
using xxh3::kStripesPerBlock;

constexpr size_t kShortBytes = 240;  // up to here the hash is another one, and has no stripes

enum class Store { kNone, kPlain, kStream };

// Takes whole stripes into the eight lanes, mixing them after every sixteenth, and copies them on the way if `to` is to be written.
using Accumulate = void (*)(uint64_t* lanes, unsigned char* to, const unsigned char* from, size_t stripe_count);

void accumulate_plainly(uint64_t* lanes, unsigned char* to, const unsigned char* from, size_t stripe_count) {
    for (size_t stripe = 0; stripe < stripe_count; ++stripe) {
        const size_t in_block = stripe % kStripesPerBlock;
        xxh3::take_stripe(lanes, from + kStripeBytes * stripe, kSecret + 8 * in_block);
        if (in_block + 1 == kStripesPerBlock) xxh3::mix_lanes(lanes, kSecret);
    }
    if (to != nullptr) std::memcpy(to, from, stripe_count * kStripeBytes);
}

#if defined(POLYPHASE_WIDE)

constexpr size_t kAhead = 40 * kStripeBytes;  // measured on cold blocks: 8 lines cost a tenth more of a whole transfer
constexpr int kSwapHalves = 0x4E;  // of each 128 bits: lane i takes what its neighbour read

template <Store kStore>
__attribute__((target("avx512f"))) void accumulate_avx512(uint64_t* lanes, unsigned char* to, const unsigned char* from, size_t stripe_count) {
    const __m512i prime = _mm512_set1_epi64(xxh3::kPrime32_1);
    const __m512i mixing = _mm512_loadu_si512(kSecret + kSecretBytes - kStripeBytes);
    __m512i sum = _mm512_loadu_si512(lanes);
    size_t in_block = 0;
    for (size_t stripe = 0; stripe < stripe_count; ++stripe) {
        const unsigned char* at = from + kStripeBytes * stripe;
        _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T0);
        const __m512i word = _mm512_loadu_si512(at);
        if constexpr (kStore == Store::kPlain) _mm512_storeu_si512(to + kStripeBytes * stripe, word);
        if constexpr (kStore == Store::kStream) _mm512_stream_si512(reinterpret_cast<__m512i*>(to + kStripeBytes * stripe), word);
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

template <Store kStore>
__attribute__((target("avx2"))) void accumulate_avx2(uint64_t* lanes, unsigned char* to, const unsigned char* from, size_t stripe_count) {
    const __m256i prime = _mm256_set1_epi64x(xxh3::kPrime32_1);
    auto* stored = reinterpret_cast<__m256i*>(lanes);
    __m256i sums[2] = {_mm256_loadu_si256(stored), _mm256_loadu_si256(stored + 1)};
    size_t in_block = 0;
    for (size_t stripe = 0; stripe < stripe_count; ++stripe) {
        const auto* at = reinterpret_cast<const __m256i*>(from + kStripeBytes * stripe);
        auto* target = reinterpret_cast<__m256i*>(to + kStripeBytes * stripe);
        _mm_prefetch(reinterpret_cast<const char*>(at) + kAhead, _MM_HINT_T0);
        ++in_block;
        for (size_t half = 0; half < 2; ++half) {
            const __m256i word = _mm256_loadu_si256(at + half);
            if constexpr (kStore == Store::kPlain) _mm256_storeu_si256(target + half, word);
            if constexpr (kStore == Store::kStream) _mm256_stream_si256(target + half, word);
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

template <Store kStore>
Accumulate best() {
    if (__builtin_cpu_supports("avx512f")) return accumulate_avx512<kStore>;
    return __builtin_cpu_supports("avx2") ? accumulate_avx2<kStore> : accumulate_plainly;
}

const Accumulate kReading = best<Store::kNone>(), kCopying = best<Store::kPlain>(), kStreaming = best<Store::kStream>();

void finish_stores() { _mm_sfence(); }

#else

constexpr Accumulate kReading = accumulate_plainly, kCopying = accumulate_plainly, kStreaming = accumulate_plainly;

void finish_stores() {}

#endif

}  // namespace

uint64_t xxh3_64_wide(const void* bytes, size_t size) {
    if (size <= kShortBytes) return xxh3_64(bytes, size, 0);
    const auto* data = static_cast<const unsigned char*>(bytes);
    uint64_t lanes[8];
    xxh3::begin_lanes(lanes);
    kReading(lanes, nullptr, data, (size - 1) / kStripeBytes);
    return xxh3::end_lanes(lanes, data + size - kStripeBytes, size, kSecret);
}

SummedCopy::SummedCopy(size_t size) : size_(size) { xxh3::begin_lanes(lanes_); }

void SummedCopy::from_buffer(unsigned char* memory, const unsigned char* buffer, size_t piece_bytes) {
    const bool is_aligned = reinterpret_cast<uintptr_t>(memory) % kStripeBytes == 0;
    take(memory, buffer, piece_bytes, buffer, is_aligned);
}

void SummedCopy::to_buffer(unsigned char* buffer, const unsigned char* memory, size_t piece_bytes) { take(buffer, memory, piece_bytes, buffer, false); }

void SummedCopy::take(unsigned char* to, const unsigned char* from, size_t piece_bytes, const unsigned char* buffer, bool streams) {
    taken_ += piece_bytes;
    const bool is_last = taken_ == size_;
    if (size_ <= kShortBytes) {
        std::memcpy(to, from, piece_bytes);
        sum_ = xxh3_64(buffer, piece_bytes, 0);
        return;
    }
    const size_t stripe_count = (is_last ? piece_bytes - 1 : piece_bytes) / kStripeBytes;
    (streams ? kStreaming : kCopying)(lanes_, to, from, stripe_count);
    const size_t done = stripe_count * kStripeBytes;
    std::memcpy(to + done, from + done, piece_bytes - done);
    if (is_last) sum_ = xxh3::end_lanes(lanes_, buffer + piece_bytes - kStripeBytes, size_, kSecret);
    if (streams) finish_stores();
}

}  // namespace polyphase
