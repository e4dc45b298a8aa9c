// Scattered blocks through a stream socket, from and into the memory where they lie, each with its checksum.
#pragma once

#include <cstddef>
#include <cstdint>

namespace polyphase {

struct BlockStream {
    int fd;  // a blocking stream socket
    unsigned char* memory;
    const uint64_t* ids;  // checked by the caller
    size_t count;
    size_t block_bytes;
    int64_t deadline_ns;  // of CLOCK_MONOTONIC
    uint64_t* sums;       // [count]: XXH3-64 of each block as it was sent or as it arrived
};

enum class StreamEnd { kDone, kLate, kClosed, kFailed };  // kFailed: errno says how

StreamEnd send_blocks(const BlockStream& stream);
StreamEnd receive_blocks(const BlockStream& stream);

}  // namespace polyphase
