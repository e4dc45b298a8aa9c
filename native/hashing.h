// From packed token ids to block hashes and sequence hashes; the recipe is told in src/polyphase/core/hashing.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "xxh3.h"

namespace polyphase {

constexpr uint64_t kChainSeed = 1337;

inline uint64_t next_sequence_hash(uint64_t parent, uint64_t block) {
    const uint64_t pair[2] = {parent, block};
    return xxh3_64(pair, sizeof pair, kChainSeed);
}

// tokens: uint32[block_count * block_size]; blocks, sequences: uint64[block_count].
inline void hash_blocks(const uint32_t* tokens, size_t block_count, size_t block_size, uint64_t seed, uint64_t* blocks) {
    for (size_t i = 0; i < block_count; ++i) blocks[i] = xxh3_64(tokens + i * block_size, 4 * block_size, seed);
}

inline void hash_sequences(const uint64_t* blocks, size_t block_count, const uint64_t* parent, uint64_t* sequences) {
    for (size_t i = 0; i < block_count; ++i) {
        sequences[i] = parent == nullptr ? blocks[i] : next_sequence_hash(*parent, blocks[i]);
        parent = sequences + i;
    }
}

}  // namespace polyphase
