// XXH3-64 without a seed, with vectors where the processor has them, alone or in the same pass as a copy. The scalar steps are those of xxh3.h.
#pragma once

#include "xxh3.h"

namespace polyphase {

// Equal to xxh3_64(bytes, size, 0); 50 GB/s instead of 14 for what lies in the cache.
uint64_t xxh3_64_wide(const void* bytes, size_t size);

// Copies a block between its memory and a buffer that stays in the cache, and sums what was copied, reading each byte once: so the sum is that
// of the bytes in the buffer even if somebody writes into the memory meanwhile.
//
// A block comes in one piece or in several: each but the last of a multiple of kPieceUnit bytes, the last of at least kPieceUnit.
class SummedCopy {
public:
    static constexpr size_t kPieceUnit = 1024;

    explicit SummedCopy(size_t size);
    void to_buffer(unsigned char* buffer, const unsigned char* memory, size_t piece_bytes);
    void from_buffer(unsigned char* memory, const unsigned char* buffer, size_t piece_bytes);  // past the cache, where that can be done
    uint64_t sum() const { return sum_; }                                                      // after the last piece

private:
    void take(unsigned char* to, const unsigned char* from, size_t piece_bytes, const unsigned char* buffer, bool streams);

    size_t size_;
    size_t taken_ = 0;
    uint64_t lanes_[8];
    uint64_t sum_ = 0;
};

}  // namespace polyphase
