// Each system call takes up to a megabyte. A chunk is summed right after the kernel has copied it, at either end, while it is in the cache.
#include "block_stream.h"

#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <vector>

#include "xxh3_wide.h"

namespace polyphase {
namespace {

constexpr size_t kMaxBuffers = 512;  // the kernel takes 1024
#if defined(MSG_NOSIGNAL)
constexpr int kNoSignal = MSG_NOSIGNAL;
#else
constexpr int kNoSignal = 0;
#endif

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
StreamEnd move_all(const BlockStream& stream, std::vector<iovec>& buffers, int option, Call call) {
    size_t first = 0;
    while (first < buffers.size()) {
        if (!arm(stream, option)) return StreamEnd::kLate;
        msghdr message{};
        message.msg_iov = &buffers[first];
        message.msg_iovlen = static_cast<decltype(message.msg_iovlen)>(buffers.size() - first);
        const ssize_t moved = call(&message);
        if (moved < 0 && errno == EINTR) continue;
        if (moved < 0) return errno == EAGAIN || errno == EWOULDBLOCK ? StreamEnd::kLate : StreamEnd::kFailed;
        if (moved == 0) return StreamEnd::kClosed;
        size_t left = static_cast<size_t>(moved);
        while (first < buffers.size() && left >= buffers[first].iov_len) left -= buffers[first++].iov_len;
        if (left != 0) {
            buffers[first].iov_base = static_cast<unsigned char*>(buffers[first].iov_base) + left;
            buffers[first].iov_len -= left;
        }
    }
    return StreamEnd::kDone;
}

template <class Call>
StreamEnd move_blocks(const BlockStream& stream, size_t chunk_bytes, int option, Call call) {
    const size_t step = std::min(kMaxBuffers, std::max<size_t>(1, chunk_bytes / stream.block_bytes));
    std::vector<iovec> buffers;
    for (size_t start = 0; start < stream.count; start += step) {
        const size_t end = std::min(stream.count, start + step);
        buffers.clear();
        for (size_t i = start; i < end; ++i) {
            unsigned char* block = stream.memory + stream.ids[i] * stream.block_bytes;
            if (!buffers.empty() && static_cast<unsigned char*>(buffers.back().iov_base) + buffers.back().iov_len == block) {
                buffers.back().iov_len += stream.block_bytes;
            } else {
                buffers.push_back({block, stream.block_bytes});
            }
        }
        const StreamEnd outcome = move_all(stream, buffers, option, call);
        if (outcome != StreamEnd::kDone) return outcome;
        for (size_t i = start; i < end; ++i) stream.sums[i] = xxh3_64_wide(stream.memory + stream.ids[i] * stream.block_bytes, stream.block_bytes);
    }
    return StreamEnd::kDone;
}

}  // namespace

StreamEnd send_blocks(const BlockStream& stream) {
    return move_blocks(stream, 1 << 20, SO_SNDTIMEO, [&](msghdr* message) { return sendmsg(stream.fd, message, kNoSignal); });
}

StreamEnd receive_blocks(const BlockStream& stream) {
    return move_blocks(stream, 1 << 20, SO_RCVTIMEO, [&](msghdr* message) { return recvmsg(stream.fd, message, MSG_WAITALL); });
}

}  // namespace polyphase
