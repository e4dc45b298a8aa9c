// Long copies bypass the cache (non-temporal stores): a block of KV is read by somebody else, later, and what a plain store costs is that
// the target's lines are first fetched to be overwritten. See docs/adr/0015 for the figures.
#include "block_copy.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#define POLYPHASE_STREAMS 1
#endif

namespace polyphase {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kStopCheckBytes = 1 << 20;
constexpr size_t kStreamFromBytes = 4096;  // below, the bookkeeping at both ends and the fence cost more than is saved

using Mover = void (*)(unsigned char* target, const unsigned char* source, size_t byte_count);

void move_plainly(unsigned char* target, const unsigned char* source, size_t byte_count) { std::memcpy(target, source, byte_count); }

#if defined(POLYPHASE_STREAMS)

// Each takes whole lines to a target that begins on one. No hardware prefetcher crosses into the next page, so the lines ahead are asked
// for; a prefetch beyond the memory's end does nothing.
constexpr size_t kAhead = 8 * kLine;

__attribute__((target("avx512f"))) void stream_avx512(unsigned char* target, const unsigned char* source, size_t byte_count) {
    for (size_t at = 0; at < byte_count; at += 2 * kLine) {
        _mm_prefetch(reinterpret_cast<const char*>(source + at + kAhead), _MM_HINT_T0);
        const __m512i first = _mm512_loadu_si512(source + at);
        if (at + 2 * kLine > byte_count) {
            _mm512_stream_si512(reinterpret_cast<__m512i*>(target + at), first);
            break;
        }
        _mm_prefetch(reinterpret_cast<const char*>(source + at + kAhead + kLine), _MM_HINT_T0);
        const __m512i second = _mm512_loadu_si512(source + at + kLine);
        _mm512_stream_si512(reinterpret_cast<__m512i*>(target + at), first);
        _mm512_stream_si512(reinterpret_cast<__m512i*>(target + at + kLine), second);
    }
}

__attribute__((target("avx2"))) void stream_avx2(unsigned char* target, const unsigned char* source, size_t byte_count) {
    for (size_t at = 0; at < byte_count; at += kLine) {
        _mm_prefetch(reinterpret_cast<const char*>(source + at + kAhead), _MM_HINT_T0);
        const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + at));
        const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + at + 32));
        _mm256_stream_si256(reinterpret_cast<__m256i*>(target + at), first);
        _mm256_stream_si256(reinterpret_cast<__m256i*>(target + at + 32), second);
    }
}

void stream_sse2(unsigned char* target, const unsigned char* source, size_t byte_count) {
    for (size_t at = 0; at < byte_count; at += kLine) {
        _mm_prefetch(reinterpret_cast<const char*>(source + at + kAhead), _MM_HINT_T0);
        for (size_t part = 0; part < kLine; part += 16) {
            const __m128i word = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + at + part));
            _mm_stream_si128(reinterpret_cast<__m128i*>(target + at + part), word);
        }
    }
}

Mover best_stream() {
    if (__builtin_cpu_supports("avx512f")) return stream_avx512;
    if (__builtin_cpu_supports("avx2")) return stream_avx2;
    return stream_sse2;
}

const Mover kStream = best_stream();

// The ends that are no whole line go the plain way.
void move_streaming(unsigned char* target, const unsigned char* source, size_t byte_count) {
    const size_t head = (kLine - reinterpret_cast<uintptr_t>(target) % kLine) % kLine;
    if (head != 0) std::memcpy(target, source, head);
    const size_t body = (byte_count - head) / kLine * kLine;
    kStream(target + head, source + head, body);
    const size_t done = head + body;
    if (done < byte_count) std::memcpy(target + done, source + done, byte_count - done);
}

void finish_stores() { _mm_sfence(); }

#else

void finish_stores() {}

#endif

Mover mover_for(size_t block_bytes) {
#if defined(POLYPHASE_STREAMS)
    if (block_bytes >= kStreamFromBytes) return move_streaming;
#endif
    return move_plainly;
}

bool is_as_expected(const BlockCopy& job, size_t place) {
    if (job.generations == nullptr) return true;
    return __atomic_load_n(&job.generations[job.source_ids[place]], __ATOMIC_ACQUIRE) == job.expected[place];
}

}  // namespace

const char* copy_method() {
#if defined(POLYPHASE_STREAMS)
    if (kStream == stream_avx512) return "avx512";
    return kStream == stream_avx2 ? "avx2" : "sse2";
#else
    return "memcpy";
#endif
}

size_t copy_blocks(const BlockCopy& job) {
    const Mover move = mover_for(job.block_bytes);
    size_t good = 0;
    size_t unchecked = 0;
    for (size_t place = 0; place < job.count; ++place) {
        if (unchecked >= kStopCheckBytes) {
            unchecked = 0;
            if (job.stop != nullptr && *job.stop != 0) break;
        }
        unchecked += job.block_bytes;
        BlockVerdict verdict = BlockVerdict::kStale;
        if (is_as_expected(job, place)) {
            move(job.target + job.target_ids[place] * job.block_bytes, job.source + job.source_ids[place] * job.block_bytes, job.block_bytes);
            std::atomic_thread_fence(std::memory_order_acquire);  // the bytes were read before the generation is looked at again
            if (is_as_expected(job, place)) verdict = BlockVerdict::kDone;
        }
        job.verdicts[place] = static_cast<uint8_t>(verdict);
        good += verdict == BlockVerdict::kDone;
    }
    finish_stores();  // whoever learns of the verdicts sees the bytes
    return good;
}

}  // namespace polyphase
