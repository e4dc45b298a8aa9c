// A digest of a set of blocks that does not depend on their order: the sum, modulo 2^64, of their mixed hashes.
// The recipe is told in src/polyphase/core/digest.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace polyphase {

// Source: the output function of SplitMix64 (Steele, Lea, Flood, 2014), with the hash as its state.
inline uint64_t mixed(uint64_t hash) {
    hash += 0x9E3779B97F4A7C15U;
    hash = (hash ^ (hash >> 30)) * 0xBF58476D1CE4E5B9U;
    hash = (hash ^ (hash >> 27)) * 0x94D049BB133111EBU;
    return hash ^ (hash >> 31);
}

inline uint64_t sum_of_mixed(const uint64_t* hashes, size_t count) {
    uint64_t sum = 0;
    for (size_t i = 0; i < count; ++i) sum += mixed(hashes[i]);
    return sum;
}

// What a worker was told to hold in a tier, and was not told to have given up.
struct Told {
    uint64_t count = 0;
    uint64_t sum = 0;

    void add(uint64_t hash) {
        ++count;
        sum += mixed(hash);
    }
    void subtract(uint64_t hash) {
        --count;
        sum -= mixed(hash);
    }
};

}  // namespace polyphase
