// Which worker holds which prefixes, in runs of up to 64 blocks.
//
//     run          hashes   h0 h1 h2 h3 h4 h5 .. h63     neighbours in a chain, as far as known
//                  live      1  1  1  1  1  1    0       somebody holds it
//                  linked    .  1  1  1  0  .    .       a prompt was seen in which it follows the block before it
//     of a tier    whole    {w0, w7}                     hold every live block
//                  parts    w3: 1 1 1 0 0 0              hold some of them
//
// A match steps over runs, not over blocks, and settles all workers that hold a whole run with one operation on bitsets. What stands
// side by side in a run is at first only a guess at what follows what in a prompt, and compared block by block; where it differs the
// table is asked. Where prompts have borne it out, blocks are linked, and only the last of a linked stretch is compared: its hash stands
// for all before it; where that differs, the place where the prompt leaves the run is searched by bisection. Holes that an eviction tore
// are zero bits. So answers are exact whatever was stored in whatever order; a bad guess costs time only. Matching puts in order what it
// finds scattered. Links are made by prompts only, never by what workers tell.
//
// Not thread-safe. Memory is bounded: beyond `capacity` blocks, runs that were not matched lately are forgotten for all workers.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "digest.h"
#include "hash_table.h"
#include "worker_set.h"

namespace polyphase {

constexpr size_t kTierCount = 4;  // device, host, disk, object
constexpr size_t kRunBlocks = 64;

// The sequence hashes of a prompt, in its order; they may still have to be converted when they are asked for.
class Chain {
public:
    virtual ~Chain() = default;
    virtual size_t size() const = 0;
    virtual uint64_t at(size_t place) = 0;
    virtual const uint64_t* range(size_t begin, size_t end) = 0;
};

// Leading blocks by tier and worker: those held in that tier or a faster one. With one level only, all tiers agree.
struct Depths {
    size_t worker_count = 0;
    size_t level_count = 1;
    std::vector<uint32_t> depth;

    uint32_t of(size_t tier, size_t worker) const {
        const size_t level = tier < level_count ? tier : level_count - 1;
        return worker < worker_count ? depth[level * worker_count + worker] : 0;
    }
};

class PrefixIndex {
public:
    explicit PrefixIndex(size_t capacity) : capacity_(capacity) {}

    void store(uint32_t worker, size_t tier, const uint64_t* hashes, size_t count);
    void remove(uint32_t worker, size_t tier, const uint64_t* hashes, size_t count);
    void clear(uint32_t worker);
    void match(Chain& chain, Depths& depths);

    size_t held(uint32_t worker, size_t tier) const { return worker < workers_.size() ? workers_[worker].held[tier] : 0; }
    Told told(uint32_t worker, size_t tier) const { return worker < workers_.size() ? workers_[worker].told[tier] : Told(); }
    bool holds_nothing(uint32_t worker) const { return worker >= workers_.size() || workers_[worker].entered == 0; }
    size_t size() const { return table_.size(); }
    size_t capacity() const { return capacity_; }
    size_t run_count() const { return runs_.size() - free_runs_.size(); }
    uint64_t forgotten() const { return forgotten_; }
    size_t heap_bytes() const;
    // Throws std::logic_error where an invariant does not hold. For tests; reads everything.
    void check() const;

private:
    struct Part {
        uint32_t worker;
        uint64_t mask;
    };
    struct Holders {
        WorkerSet whole;
        std::unique_ptr<std::vector<Part>> parts;  // by worker
    };
    struct Run {
        std::unique_ptr<uint64_t[]> hashes;
        uint64_t live = 0;
        uint64_t linked = 0;
        Holders device;
        std::unique_ptr<std::array<Holders, kTierCount - 1>> lower;
        uint8_t room = 0;  // length of `hashes`
        bool matched = false;
    };
    struct Last {
        Place place{UINT32_MAX, 0};
        uint64_t hash = 0;
    };
    struct Worker {
        Last last;  // block stored, which the next one may follow
        std::array<size_t, kTierCount> held{};
        // With what was forgotten for want of room: a block removed that the index does not know was one of those, if there are any.
        std::array<Told, kTierCount> told{};
        size_t entered = 0;              // pairs of run and tier that it holds something of
        std::vector<uint32_t> run_list;  // all of these runs, and some that it has left
    };
    struct Step {
        Place place;
        uint32_t block_count;
    };

    static Holders* holders_of(Run& run, size_t tier);
    static const Holders* holders_of(const Run& run, size_t tier);
    static Holders& make_holders(Run& run, size_t tier);
    static size_t find_part(const std::vector<Part>& parts, uint32_t worker);
    static uint64_t mask_of(const Run& run, size_t tier, uint32_t worker);
    static uint64_t held_by_anybody(const Run& run);
    static bool only_held_by(const Run& run, uint32_t worker, size_t tier);
    static bool held_alike(const Run& run, const Run& other, uint32_t offset);
    static void put_hash(Run& run, uint32_t offset, uint64_t hash);

    uint32_t new_run();
    void free_run(uint32_t number);
    void add(uint32_t number, size_t tier, uint32_t worker, uint64_t mask);
    void take(uint32_t number, size_t tier, uint32_t worker, uint64_t mask);
    void detach(uint32_t number, uint32_t offset);
    void settle(Run& run);
    void enter(uint32_t number, size_t tier, uint32_t worker);
    void leave(size_t tier, uint32_t worker);
    bool holds(uint32_t worker, size_t tier, uint64_t hash) const;
    void give_up(uint32_t number, size_t tier, uint32_t worker, uint64_t mask);
    void withdraw(size_t tier, uint32_t worker, uint64_t hash);
    Place place_new(Place last, size_t tier, uint32_t worker, uint64_t hash);
    bool make_room(uint32_t kept_run);
    void forget_run(uint32_t number);

    static size_t follow(Run& run, uint32_t offset, Chain& chain, size_t position, size_t limit);
    bool survive(const Run& run, const Step& step, size_t position, size_t level, Depths& depths);
    void weave(const uint64_t* hashes);
    bool is_at(Place place, uint64_t hash) const;
    bool can_follow(Place last, Place next) const;
    void move_block(Place from, Place to, uint64_t hash);
    uint32_t split_off(const Step& step, const uint64_t* hashes);

    size_t capacity_;
    HashTable table_;
    std::vector<Run> runs_;
    std::vector<uint32_t> free_runs_;
    std::vector<Worker> workers_;
    size_t lower_entered_ = 0;  // pairs of run and worker in tiers below the device
    size_t clock_hand_ = 0;
    uint64_t forgotten_ = 0;
    // Scratch of match.
    std::array<std::vector<uint64_t>, kTierCount> alive_;
    std::vector<uint64_t> survivors_;
    std::vector<Step> steps_;
};

}  // namespace polyphase
