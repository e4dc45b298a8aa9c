// A set of worker numbers: up to two in place, more as a bitset. Most blocks are held by one worker, a hot prefix by all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace polyphase {

class WorkerSet {
public:
    WorkerSet() = default;
    WorkerSet(WorkerSet&& other) noexcept { swap(other); }
    WorkerSet& operator=(WorkerSet&& other) noexcept {
        swap(other);
        return *this;
    }
    WorkerSet(const WorkerSet&) = delete;
    WorkerSet& operator=(const WorkerSet&) = delete;
    ~WorkerSet() {
        if (word_count_ > 0) std::free(bits_);
    }

    uint32_t size() const { return size_; }
    bool empty() const { return size_ == 0; }

    bool contains(uint32_t worker) const {
        if (word_count_ == 0) return (size_ > 0 && ids_[0] == worker) || (size_ > 1 && ids_[1] == worker);
        return worker / 64 < word_count_ && (bits_[worker / 64] >> (worker % 64) & 1) != 0;
    }

    // The worker must not be in it yet.
    void add(uint32_t worker) {
        if (word_count_ == 0) {
            if (size_ < 2) {
                ids_[size_++] = worker;
                return;
            }
            const uint32_t first = ids_[0], second = ids_[1];
            bits_ = nullptr;
            reserve(first > second ? first : second);
            set_bit(first);
            set_bit(second);
        }
        reserve(worker);
        set_bit(worker);
        ++size_;
    }

    // The worker must be in it.
    void remove(uint32_t worker) {
        --size_;
        if (word_count_ == 0) {
            if (ids_[0] == worker) ids_[0] = ids_[1];
            return;
        }
        bits_[worker / 64] &= ~(uint64_t{1} << (worker % 64));
        if (size_ == 0) {
            std::free(bits_);
            word_count_ = 0;
        }
    }

    // Adds the members that are in `filter` to `into`; both are bitsets of `word_count` words.
    void intersect_into(const uint64_t* filter, uint64_t* into, size_t word_count) const {
        if (word_count_ == 0) {
            for (uint32_t i = 0; i < size_; ++i) {
                const uint64_t bit = uint64_t{1} << (ids_[i] % 64);
                into[ids_[i] / 64] |= filter[ids_[i] / 64] & bit;
            }
            return;
        }
        const size_t common = word_count < word_count_ ? word_count : word_count_;
        for (size_t i = 0; i < common; ++i) into[i] |= filter[i] & bits_[i];
    }

    template <class Visit>
    void for_each(Visit&& visit) const {
        if (word_count_ == 0) {
            for (uint32_t i = 0; i < size_; ++i) visit(ids_[i]);
            return;
        }
        for (uint32_t i = 0; i < word_count_; ++i) {
            for (uint64_t word = bits_[i]; word != 0; word &= word - 1) visit(64 * i + static_cast<uint32_t>(__builtin_ctzll(word)));
        }
    }

    size_t heap_bytes() const { return word_count_ * sizeof(uint64_t); }

private:
    void set_bit(uint32_t worker) { bits_[worker / 64] |= uint64_t{1} << (worker % 64); }

    void reserve(uint32_t worker) {
        const uint32_t needed = worker / 64 + 1;
        if (needed <= word_count_) return;
        auto* grown = static_cast<uint64_t*>(std::realloc(word_count_ > 0 ? bits_ : nullptr, needed * sizeof(uint64_t)));
        if (grown == nullptr) throw std::bad_alloc();
        std::memset(grown + word_count_, 0, (needed - word_count_) * sizeof(uint64_t));
        bits_ = grown;
        word_count_ = needed;
    }

    void swap(WorkerSet& other) noexcept {
        std::swap(size_, other.size_);
        std::swap(word_count_, other.word_count_);
        std::swap(bits_, other.bits_);  // as wide as the two ids
    }

    uint32_t size_ = 0;
    uint32_t word_count_ = 0;  // 0: the members are in ids_
    union {
        uint32_t ids_[2];
        uint64_t* bits_ = nullptr;
    };
    static_assert(sizeof(uint64_t*) == 8, "the two ids and the pointer share eight bytes");
};

}  // namespace polyphase
