// XXH3 with 64 bits of output and a seed: the hash of blocks and prefixes.
//
// Written from the algorithm's specification (github.com/Cyan4973/xxHash, doc/xxhash_spec.md); the tests compare every length with the
// `xxhash` package. A 64-byte block, the usual one, takes four multiplications; nothing here is vectorised by hand.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "this code reads little-endian words in place; on other machines the Python implementation is used"
#endif

namespace polyphase {

namespace xxh3 {

constexpr uint64_t kPrime32_1 = 0x9E3779B1U, kPrime32_2 = 0x85EBCA77U, kPrime32_3 = 0xC2B2AE3DU;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87U, kPrime64_2 = 0xC2B2AE3D27D4EB4FU, kPrime64_3 = 0x165667B19E3779F9U;
constexpr uint64_t kPrime64_4 = 0x85EBCA77C2B2AE63U, kPrime64_5 = 0x27D4EB2F165667C5U;
constexpr uint64_t kMix1 = 0x165667919E3779F9U, kMix2 = 0x9FB21C651E98DF25U;

constexpr size_t kSecretBytes = 192;
constexpr size_t kStripeBytes = 64;
constexpr size_t kStripesPerBlock = (kSecretBytes - kStripeBytes) / 8;
// Source: the specification's default secret.
alignas(8) constexpr unsigned char kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90,
    0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d,
    0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28,
    0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e,
    0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b,
    0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83,
    0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16,
    0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

inline uint32_t read32(const unsigned char* at) {
    uint32_t word;
    std::memcpy(&word, at, sizeof word);
    return word;
}

inline uint64_t read64(const unsigned char* at) {
    uint64_t word;
    std::memcpy(&word, at, sizeof word);
    return word;
}

inline uint64_t rotate_left(uint64_t word, int bits) { return (word << bits) | (word >> (64 - bits)); }

inline uint64_t folded_product(uint64_t a, uint64_t b) {
    const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

inline uint64_t avalanche(uint64_t hash) {
    hash ^= hash >> 37;
    hash *= kMix1;
    return hash ^ (hash >> 32);
}

inline uint64_t avalanche_short(uint64_t hash) {
    hash ^= hash >> 33;
    hash *= kPrime64_2;
    hash ^= hash >> 29;
    hash *= kPrime64_3;
    return hash ^ (hash >> 32);
}

inline uint64_t mix16(const unsigned char* data, const unsigned char* secret, uint64_t seed) {
    return folded_product(read64(data) ^ (read64(secret) + seed), read64(data + 8) ^ (read64(secret + 8) - seed));
}

inline uint64_t hash_0_to_16(const unsigned char* data, size_t size, uint64_t seed) {
    if (size > 8) {
        const uint64_t low = read64(data) ^ ((read64(kSecret + 24) ^ read64(kSecret + 32)) + seed);
        const uint64_t high = read64(data + size - 8) ^ ((read64(kSecret + 40) ^ read64(kSecret + 48)) - seed);
        return avalanche(size + __builtin_bswap64(low) + high + folded_product(low, high));
    }
    if (size >= 4) {
        seed ^= static_cast<uint64_t>(__builtin_bswap32(static_cast<uint32_t>(seed))) << 32;
        const uint64_t word = read32(data + size - 4) + (static_cast<uint64_t>(read32(data)) << 32);
        uint64_t hash = word ^ ((read64(kSecret + 8) ^ read64(kSecret + 16)) - seed);
        hash ^= rotate_left(hash, 49) ^ rotate_left(hash, 24);
        hash *= kMix2;
        hash ^= (hash >> 35) + size;
        hash *= kMix2;
        return hash ^ (hash >> 28);
    }
    if (size > 0) {
        const uint32_t first = data[0], middle = data[size >> 1], last = data[size - 1];
        const uint32_t word = (first << 16) | (middle << 24) | last | (static_cast<uint32_t>(size) << 8);
        return avalanche_short(word ^ ((read32(kSecret) ^ read32(kSecret + 4)) + seed));
    }
    return avalanche_short(seed ^ read64(kSecret + 56) ^ read64(kSecret + 64));
}

inline uint64_t hash_17_to_128(const unsigned char* data, size_t size, uint64_t seed) {
    uint64_t sum = size * kPrime64_1;
    for (size_t pair = (size - 1) / 32 + 1; pair-- > 0;) {
        sum += mix16(data + 16 * pair, kSecret + 32 * pair, seed);
        sum += mix16(data + size - 16 * (pair + 1), kSecret + 32 * pair + 16, seed);
    }
    return avalanche(sum);
}

inline uint64_t hash_129_to_240(const unsigned char* data, size_t size, uint64_t seed) {
    uint64_t sum = size * kPrime64_1;
    for (size_t i = 0; i < 8; ++i) sum += mix16(data + 16 * i, kSecret + 16 * i, seed);
    sum = avalanche(sum);
    for (size_t i = 8; i < size / 16; ++i) sum += mix16(data + 16 * i, kSecret + 16 * (i - 8) + 3, seed);
    sum += mix16(data + size - 16, kSecret + 136 - 17, seed);
    return avalanche(sum);
}

inline void take_stripe(uint64_t* lanes, const unsigned char* data, const unsigned char* secret) {
    for (size_t i = 0; i < 8; ++i) {
        const uint64_t word = read64(data + 8 * i);
        const uint64_t key = word ^ read64(secret + 8 * i);
        lanes[i ^ 1] += word;
        lanes[i] += (key & 0xFFFFFFFFU) * (key >> 32);
    }
}

inline void begin_lanes(uint64_t* lanes) {
    const uint64_t first[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3, kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
    std::memcpy(lanes, first, sizeof first);
}

// After each sixteenth stripe.
inline void mix_lanes(uint64_t* lanes, const unsigned char* secret) {
    for (size_t i = 0; i < 8; ++i) {
        lanes[i] ^= lanes[i] >> 47;
        lanes[i] ^= read64(secret + kSecretBytes - kStripeBytes + 8 * i);
        lanes[i] *= kPrime32_1;
    }
}

// The last 64 bytes of `size`, and the lanes folded into one word.
inline uint64_t end_lanes(uint64_t* lanes, const unsigned char* last_stripe, size_t size, const unsigned char* secret) {
    take_stripe(lanes, last_stripe, secret + kSecretBytes - kStripeBytes - 7);
    uint64_t sum = size * kPrime64_1;
    for (size_t i = 0; i < 4; ++i) {
        sum += folded_product(lanes[2 * i] ^ read64(secret + 11 + 16 * i), lanes[2 * i + 1] ^ read64(secret + 11 + 16 * i + 8));
    }
    return avalanche(sum);
}

inline uint64_t hash_long(const unsigned char* data, size_t size, uint64_t seed) {
    alignas(64) unsigned char secret[kSecretBytes];
    for (size_t at = 0; at < kSecretBytes; at += 16) {
        const uint64_t low = read64(kSecret + at) + seed, high = read64(kSecret + at + 8) - seed;
        std::memcpy(secret + at, &low, 8);
        std::memcpy(secret + at + 8, &high, 8);
    }
    uint64_t lanes[8];
    begin_lanes(lanes);
    const size_t stripe_count = (size - 1) / kStripeBytes;
    for (size_t stripe = 0; stripe < stripe_count; ++stripe) {
        const size_t in_block = stripe % kStripesPerBlock;
        take_stripe(lanes, data + kStripeBytes * stripe, secret + 8 * in_block);
        if (in_block + 1 == kStripesPerBlock) mix_lanes(lanes, secret);
    }
    return end_lanes(lanes, data + size - kStripeBytes, size, secret);
}

}  // namespace xxh3

inline uint64_t xxh3_64(const void* bytes, size_t size, uint64_t seed) {
    const auto* data = static_cast<const unsigned char*>(bytes);
    if (size <= 16) return xxh3::hash_0_to_16(data, size, seed);
    if (size <= 128) return xxh3::hash_17_to_128(data, size, seed);
    if (size <= 240) return xxh3::hash_129_to_240(data, size, seed);
    return xxh3::hash_long(data, size, seed);
}

}  // namespace polyphase
