// Blocks pass through a buffer of a megabyte that stays in the cache: one pass copies a block between memory and buffer and sums it, one
// system call moves the full buffer. So memory is read or written once, and the sum costs no second pass over what has gone cold; the kernel
// copies to and from hot lines, and arriving blocks are stored past the cache.
//
// The buffer is as large as it is because each return from a call acknowledges what came, which wakes the sender: receiving 64 KiB a call
// costs half as much again as a megabyte, summed or not.
#include "block_stream.h"

#include <sys/socket.h>
#include <sys/time.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <vector>

#include "big_pages.h"
#include "xxh3_wide.h"

namespace polyphase {
namespace {

constexpr size_t kBufferBytes = 1 << 20;
#if defined(MSG_NOSIGNAL)
constexpr int kNoSignal = MSG_NOSIGNAL;
#else
constexpr int kNoSignal = 0;
#endif
#if defined(MSG_MORE)
constexpr int kMore = MSG_MORE;
#else
constexpr int kMore = 0;
#endif

// The last piece of a block may be a unit longer than the others.
unsigned char* buffer() {
    thread_local std::vector<unsigned char, BigPageAllocator<unsigned char>> bytes(2 * kBufferBytes);
    return bytes.data();
}

// What is left of the time, given to the kernel for the next call. False: nothing is left.
bool arm(const BlockStream& stream, int option) {
    const int64_t now_ns = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
    const int64_t left_us = (stream.deadline_ns - now_ns) / 1000;
    if (left_us <= 0) return false;
    timeval left{};
    left.tv_sec = left_us / 1000000;
    left.tv_usec = static_cast<decltype(left.tv_usec)>(left_us % 1000000);
    setsockopt(stream.fd, SOL_SOCKET, option, &left, sizeof left);
    return true;
}

template <class Call>
StreamEnd move_all(const BlockStream& stream, unsigned char* at, size_t size, int option, Call call) {
    while (size != 0) {
        if (!arm(stream, option)) return StreamEnd::kLate;
        const ssize_t moved = call(at, size);
        if (moved < 0 && errno == EINTR) continue;
        if (moved < 0) return errno == EAGAIN || errno == EWOULDBLOCK ? StreamEnd::kLate : StreamEnd::kFailed;
        if (moved == 0) return StreamEnd::kClosed;
        at += moved;
        size -= static_cast<size_t>(moved);
    }
    return StreamEnd::kDone;
}

StreamEnd send_all(const BlockStream& stream, unsigned char* at, size_t size, bool is_last) {
    const int flags = kNoSignal | (is_last ? 0 : kMore);
    return move_all(stream, at, size, SO_SNDTIMEO, [&](unsigned char* from, size_t left) { return send(stream.fd, from, left, flags); });
}

StreamEnd receive_all(const BlockStream& stream, unsigned char* at, size_t size) {
    return move_all(stream, at, size, SO_RCVTIMEO, [&](unsigned char* to, size_t left) { return recv(stream.fd, to, left, MSG_WAITALL); });
}

unsigned char* block(const BlockStream& stream, size_t place) { return stream.memory + stream.ids[place] * stream.block_bytes; }

// Blocks of up to a buffer: as many at a time as fit.
StreamEnd send_small(const BlockStream& stream, unsigned char* bytes) {
    const size_t width = stream.block_bytes, step = kBufferBytes / width;
    for (size_t start = 0; start < stream.count; start += step) {
        const size_t end = std::min(stream.count, start + step);
        for (size_t place = start; place < end; ++place) {
            SummedCopy copy(width);
            copy.to_buffer(bytes + (place - start) * width, block(stream, place), width);
            stream.sums[place] = copy.sum();
        }
        const StreamEnd outcome = send_all(stream, bytes, (end - start) * width, end == stream.count);
        if (outcome != StreamEnd::kDone) return outcome;
    }
    return StreamEnd::kDone;
}

StreamEnd receive_small(const BlockStream& stream, unsigned char* bytes) {
    const size_t width = stream.block_bytes, step = kBufferBytes / width;
    for (size_t start = 0; start < stream.count; start += step) {
        const size_t end = std::min(stream.count, start + step);
        const StreamEnd outcome = receive_all(stream, bytes, (end - start) * width);
        if (outcome != StreamEnd::kDone) return outcome;
        for (size_t place = start; place < end; ++place) {
            SummedCopy copy(width);
            copy.from_buffer(block(stream, place), bytes + (place - start) * width, width);
            stream.sums[place] = copy.sum();
        }
    }
    return StreamEnd::kDone;
}

// Larger ones: a piece at a time, none of them so short at the end that it could not be summed.
size_t piece_at(size_t offset, size_t width) {
    const size_t left = width - offset;
    return left < kBufferBytes + SummedCopy::kPieceUnit ? left : kBufferBytes;
}

StreamEnd send_large(const BlockStream& stream, unsigned char* bytes) {
    for (size_t place = 0; place < stream.count; ++place) {
        SummedCopy copy(stream.block_bytes);
        for (size_t offset = 0, piece; offset < stream.block_bytes; offset += piece) {
            piece = piece_at(offset, stream.block_bytes);
            copy.to_buffer(bytes, block(stream, place) + offset, piece);
            const bool is_last = place + 1 == stream.count && offset + piece == stream.block_bytes;
            const StreamEnd outcome = send_all(stream, bytes, piece, is_last);
            if (outcome != StreamEnd::kDone) return outcome;
        }
        stream.sums[place] = copy.sum();
    }
    return StreamEnd::kDone;
}

StreamEnd receive_large(const BlockStream& stream, unsigned char* bytes) {
    for (size_t place = 0; place < stream.count; ++place) {
        SummedCopy copy(stream.block_bytes);
        for (size_t offset = 0, piece; offset < stream.block_bytes; offset += piece) {
            piece = piece_at(offset, stream.block_bytes);
            const StreamEnd outcome = receive_all(stream, bytes, piece);
            if (outcome != StreamEnd::kDone) return outcome;
            copy.from_buffer(block(stream, place) + offset, bytes, piece);
        }
        stream.sums[place] = copy.sum();
    }
    return StreamEnd::kDone;
}

}  // namespace

StreamEnd send_blocks(const BlockStream& stream) {
    return stream.block_bytes <= kBufferBytes ? send_small(stream, buffer()) : send_large(stream, buffer());
}

StreamEnd receive_blocks(const BlockStream& stream) {
    return stream.block_bytes <= kBufferBytes ? receive_small(stream, buffer()) : receive_large(stream, buffer());
}

}  // namespace polyphase
