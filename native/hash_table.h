// Where each known block lies: sequence hash -> (run, offset). Open addressing, linear probing, no tombstones.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "big_pages.h"

namespace polyphase {

struct Place {
    uint32_t run;
    uint32_t offset;
};

class HashTable {
public:
    HashTable() : slots_(kSmallest), mask_(kSmallest - 1) {}

    const Place* find(uint64_t hash) const {
        for (size_t at = home(hash);; at = (at + 1) & mask_) {
            const Slot& slot = slots_[at];
            if (slot.place.run == kEmpty) return nullptr;
            if (slot.hash == hash) return &slot.place;
        }
    }

    // Adds the hash if it is not there. Returns its place, to be read, or to be set if it was added; valid until the next change.
    Place* find_or_add(uint64_t hash, bool& is_new) {
        if ((size_ + 1) * 10 > slots_.size() * 7) grow();
        for (size_t at = home(hash);; at = (at + 1) & mask_) {
            Slot& slot = slots_[at];
            is_new = slot.place.run == kEmpty;
            if (is_new) {
                ++size_;
                slot.hash = hash;
            } else if (slot.hash != hash) {
                continue;
            }
            return &slot.place;
        }
    }

    // The hash must be there.
    void move(uint64_t hash, Place place) {
        bool is_new = false;
        *find_or_add(hash, is_new) = place;
    }

    void prefetch(uint64_t hash) const { __builtin_prefetch(&slots_[home(hash)]); }

    // The hash must be there. What stands behind it moves up, so that a probe never has to pass a hole.
    void erase(uint64_t hash) {
        size_t hole = home(hash);
        while (slots_[hole].hash != hash || slots_[hole].place.run == kEmpty) hole = (hole + 1) & mask_;
        for (size_t at = (hole + 1) & mask_; slots_[at].place.run != kEmpty; at = (at + 1) & mask_) {
            if (((at - home(slots_[at].hash)) & mask_) >= ((at - hole) & mask_)) {
                slots_[hole] = slots_[at];
                hole = at;
            }
        }
        slots_[hole].place.run = kEmpty;
        --size_;
    }

    size_t size() const { return size_; }
    size_t heap_bytes() const { return slots_.size() * sizeof(Slot); }

private:
    static constexpr uint32_t kEmpty = UINT32_MAX;
    static constexpr size_t kSmallest = 64;

    struct Slot {
        uint64_t hash = 0;
        Place place{kEmpty, 0};
    };

    // Hashes from the wire need not be spread well.
    size_t home(uint64_t hash) const { return ((hash * 0x9E3779B97F4A7C15U) >> 20) & mask_; }

    void grow() {
        std::vector<Slot, BigPageAllocator<Slot>> old(slots_.size() * 2);
        old.swap(slots_);
        mask_ = slots_.size() - 1;
        for (const Slot& slot : old) {
            if (slot.place.run == kEmpty) continue;
            size_t at = home(slot.hash);
            while (slots_[at].place.run != kEmpty) at = (at + 1) & mask_;
            slots_[at] = slot;
        }
    }

    std::vector<Slot, BigPageAllocator<Slot>> slots_;
    size_t mask_;
    size_t size_ = 0;
};

}  // namespace polyphase
