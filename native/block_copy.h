// Copies many scattered blocks from one memory to another and says of each whether it is what was offered.
#pragma once

#include <cstddef>
#include <cstdint>

namespace polyphase {

// What became of a block; the numbers are those of polyphase.transfer.verdicts.Verdict.
enum class BlockVerdict : uint8_t { kPending = 0, kDone = 1, kStale = 2 };

struct BlockCopy {
    unsigned char* target;
    const unsigned char* source;
    const uint64_t* target_ids;
    const uint64_t* source_ids;
    size_t count;
    size_t block_bytes;
    const uint64_t* generations;  // of the source's blocks, by id; may be null
    const uint64_t* expected;     // the generation that each copied block must have before and after; null if `generations` is
    uint8_t* verdicts;            // [count], written as blocks are done
    const volatile uint8_t* stop; // another thread sets it; looked at about every megabyte; may be null
};

// Ids must lie within both memories: the caller has checked. Blocks that `stop` kept from being copied stay pending.
// Returns how many were copied and found good.
size_t copy_blocks(const BlockCopy& job);

// "avx512", "avx2", "sse2" or "memcpy": how long blocks are stored on this processor.
const char* copy_method();

}  // namespace polyphase
