#include "prefix_index.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace polyphase {

namespace {

constexpr uint32_t kNoRun = UINT32_MAX;
constexpr size_t kRunsSized = size_t{1} << 16;
constexpr size_t kProbesAhead = 8;  // far enough for memory to answer meanwhile

uint64_t bit(uint32_t offset) { return uint64_t{1} << offset; }
uint64_t ones(size_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }
size_t popcount(uint64_t mask) { return static_cast<size_t>(__builtin_popcountll(mask)); }
uint32_t lowest(uint64_t mask) { return static_cast<uint32_t>(__builtin_ctzll(mask)); }

void prefetch_words(const uint64_t* words, size_t count) {
    for (size_t i = 0; i < count; i += 8) __builtin_prefetch(words + i);
}

void require(bool holds, const char* what) {
    if (!holds) throw std::logic_error(std::string("prefix index: ") + what);
}

}  // namespace

// Holders of a run

PrefixIndex::Holders* PrefixIndex::holders_of(Run& run, size_t tier) {
    if (tier == 0) return &run.device;
    return run.lower ? &(*run.lower)[tier - 1] : nullptr;
}

const PrefixIndex::Holders* PrefixIndex::holders_of(const Run& run, size_t tier) { return holders_of(const_cast<Run&>(run), tier); }

PrefixIndex::Holders& PrefixIndex::make_holders(Run& run, size_t tier) {
    if (tier > 0 && !run.lower) run.lower = std::make_unique<std::array<Holders, kTierCount - 1>>();
    return *holders_of(run, tier);
}

// Where the worker's part is, or would be.
size_t PrefixIndex::find_part(const std::vector<Part>& parts, uint32_t worker) {
    const auto at = std::lower_bound(parts.begin(), parts.end(), worker, [](const Part& part, uint32_t sought) { return part.worker < sought; });
    return static_cast<size_t>(at - parts.begin());
}

uint64_t PrefixIndex::mask_of(const Run& run, size_t tier, uint32_t worker) {
    const Holders* holders = holders_of(run, tier);
    if (holders == nullptr) return 0;
    if (holders->whole.contains(worker)) return run.live;
    if (!holders->parts) return 0;
    const size_t at = find_part(*holders->parts, worker);
    return at < holders->parts->size() && (*holders->parts)[at].worker == worker ? (*holders->parts)[at].mask : 0;
}

uint64_t PrefixIndex::held_by_anybody(const Run& run) {
    uint64_t held = 0;
    for (size_t tier = 0; tier < kTierCount; ++tier) {
        const Holders* holders = holders_of(run, tier);
        if (holders == nullptr) break;
        if (!holders->whole.empty()) return run.live;
        if (!holders->parts) continue;
        for (const Part& part : *holders->parts) held |= part.mask;
    }
    return held;
}

// Whether the worker holds all of the run in this tier, and nobody else holds anything of it anywhere.
bool PrefixIndex::only_held_by(const Run& run, uint32_t worker, size_t tier) {
    for (size_t other = 0; other < kTierCount; ++other) {
        const Holders* holders = holders_of(run, other);
        if (holders == nullptr) break;
        if (holders->parts || holders->whole.size() != (other == tier ? 1 : 0)) return false;
    }
    const Holders* holders = holders_of(run, tier);
    return holders != nullptr && holders->whole.contains(worker);
}

// Whether whoever holds anything of `run` holds all of it, and holds the block of `other` too, tier by tier, and nobody else does.
bool PrefixIndex::held_alike(const Run& run, const Run& other, uint32_t offset) {
    for (size_t tier = 0; tier < kTierCount; ++tier) {
        const Holders* ours = holders_of(run, tier);
        const Holders* theirs = holders_of(other, tier);
        if (ours != nullptr && ours->parts) return false;
        size_t common = 0, count = 0;
        const auto visit = [&](uint32_t worker) {
            ++count;
            if (ours != nullptr && ours->whole.contains(worker)) ++common;
        };
        if (theirs != nullptr) {
            if (theirs->whole.size() > (ours == nullptr ? 0 : ours->whole.size())) return false;
            theirs->whole.for_each(visit);
            if (theirs->parts) {
                for (const Part& part : *theirs->parts) {
                    if (part.mask & bit(offset)) visit(part.worker);
                }
            }
        }
        if (common != count || count != (ours == nullptr ? 0 : ours->whole.size())) return false;
    }
    return true;
}

void PrefixIndex::put_hash(Run& run, uint32_t offset, uint64_t hash) {
    if (offset >= run.room) {
        size_t room = run.room == 0 ? 2 : run.room;
        while (room <= offset) room *= 2;
        std::unique_ptr<uint64_t[]> grown(new uint64_t[room]());
        std::copy_n(run.hashes.get(), run.room, grown.get());
        run.hashes = std::move(grown);
        run.room = static_cast<uint8_t>(room);
    }
    run.hashes[offset] = hash;
    run.linked &= ~(bit(offset) | (offset + 1 < kRunBlocks ? bit(offset + 1) : 0));
}

// Runs

uint32_t PrefixIndex::new_run() {
    if (free_runs_.empty()) {
        runs_.emplace_back();
        return static_cast<uint32_t>(runs_.size() - 1);
    }
    const uint32_t number = free_runs_.back();
    free_runs_.pop_back();
    return number;
}

void PrefixIndex::free_run(uint32_t number) {
    runs_[number] = Run();
    free_runs_.push_back(number);
}

void PrefixIndex::enter(uint32_t number, size_t tier, uint32_t worker) {
    Worker& state = workers_[worker];
    ++state.entered;
    if (tier > 0) ++lower_entered_;
    state.run_list.push_back(number);
    if (state.run_list.size() <= 2 * state.entered + 64) return;
    std::sort(state.run_list.begin(), state.run_list.end());
    state.run_list.erase(std::unique(state.run_list.begin(), state.run_list.end()), state.run_list.end());
    const auto has_left = [&](uint32_t listed) {
        if (listed == number) return false;
        for (size_t t = 0; t < kTierCount; ++t) {
            if (mask_of(runs_[listed], t, worker) != 0) return false;
        }
        return true;
    };
    state.run_list.erase(std::remove_if(state.run_list.begin(), state.run_list.end(), has_left), state.run_list.end());
}

void PrefixIndex::leave(size_t tier, uint32_t worker) {
    --workers_[worker].entered;
    if (tier > 0) --lower_entered_;
}

bool PrefixIndex::holds(uint32_t worker, size_t tier, uint64_t hash) const {
    const Place* place = table_.find(hash);
    return place != nullptr && (mask_of(runs_[place->run], tier, worker) & bit(place->offset)) != 0;
}

// The worker gave up blocks of this run, of which it may not be known to hold all.
void PrefixIndex::give_up(uint32_t number, size_t tier, uint32_t worker, uint64_t mask) {
    const Run& run = runs_[number];
    for (uint64_t rest = mask & ~mask_of(run, tier, worker); rest != 0; rest &= rest - 1) withdraw(tier, worker, run.hashes[lowest(rest)]);
    take(number, tier, worker, mask);
}

// The worker gave up a block that it is not known to hold.
void PrefixIndex::withdraw(size_t tier, uint32_t worker, uint64_t hash) {
    Worker& state = workers_[worker];
    if (state.told[tier].count > state.held[tier]) state.told[tier].subtract(hash);
}

// The worker holds the blocks of `mask`, all of them live.
void PrefixIndex::add(uint32_t number, size_t tier, uint32_t worker, uint64_t mask) {
    Run& run = runs_[number];
    Holders& holders = make_holders(run, tier);
    if (mask == 0 || holders.whole.contains(worker)) return;
    size_t at = 0;
    bool is_listed = false;
    if (holders.parts) {
        at = find_part(*holders.parts, worker);
        is_listed = at < holders.parts->size() && (*holders.parts)[at].worker == worker;
    }
    const uint64_t before = is_listed ? (*holders.parts)[at].mask : 0;
    const uint64_t after = before | mask;
    if (before == 0) enter(number, tier, worker);
    Worker& state = workers_[worker];
    state.held[tier] += popcount(after & ~before);
    for (uint64_t fresh = after & ~before; fresh != 0; fresh &= fresh - 1) state.told[tier].add(run.hashes[lowest(fresh)]);
    if (after == run.live) {
        if (is_listed) {
            holders.parts->erase(holders.parts->begin() + static_cast<std::ptrdiff_t>(at));
            if (holders.parts->empty()) holders.parts.reset();
        }
        holders.whole.add(worker);
    } else if (is_listed) {
        (*holders.parts)[at].mask = after;
    } else {
        if (!holders.parts) holders.parts = std::make_unique<std::vector<Part>>();
        holders.parts->insert(holders.parts->begin() + static_cast<std::ptrdiff_t>(at), Part{worker, after});
    }
}

// The worker no longer holds the blocks of `mask`; blocks that nobody holds are forgotten. May free the run.
void PrefixIndex::take(uint32_t number, size_t tier, uint32_t worker, uint64_t mask) {
    Run& run = runs_[number];
    const uint64_t before = mask_of(run, tier, worker);
    const uint64_t gone = before & mask;
    if (gone == 0) return;
    Holders& holders = *holders_of(run, tier);
    const uint64_t after = before & ~gone;
    workers_[worker].held[tier] -= popcount(gone);
    for (uint64_t rest = gone; rest != 0; rest &= rest - 1) workers_[worker].told[tier].subtract(run.hashes[lowest(rest)]);
    if (holders.whole.contains(worker)) {
        holders.whole.remove(worker);
        if (after != 0) {
            if (!holders.parts) holders.parts = std::make_unique<std::vector<Part>>();
            const auto at = static_cast<std::ptrdiff_t>(find_part(*holders.parts, worker));
            holders.parts->insert(holders.parts->begin() + at, Part{worker, after});
        }
    } else {
        const size_t at = find_part(*holders.parts, worker);
        if (after != 0) {
            (*holders.parts)[at].mask = after;
        } else {
            holders.parts->erase(holders.parts->begin() + static_cast<std::ptrdiff_t>(at));
            if (holders.parts->empty()) holders.parts.reset();
        }
    }
    if (after == 0) leave(tier, worker);
    const uint64_t dead = gone & ~held_by_anybody(run);
    if (dead == 0) return;
    for (uint64_t rest = dead; rest != 0; rest &= rest - 1) table_.prefetch(run.hashes[lowest(rest)]);
    for (uint64_t rest = dead; rest != 0; rest &= rest - 1) table_.erase(run.hashes[lowest(rest)]);
    run.live &= ~dead;
    if (run.live == 0) {
        free_run(number);
    } else {
        settle(run);
    }
}

// After live blocks became fewer: who holds all that is left holds the run whole.
void PrefixIndex::settle(Run& run) {
    for (size_t tier = 0; tier < kTierCount; ++tier) {
        Holders* holders = holders_of(run, tier);
        if (holders == nullptr || !holders->parts) continue;
        auto kept = holders->parts->begin();
        for (const Part& part : *holders->parts) {
            if (part.mask == run.live) {
                holders->whole.add(part.worker);
            } else {
                *kept++ = part;
            }
        }
        holders->parts->erase(kept, holders->parts->end());
        if (holders->parts->empty()) holders->parts.reset();
    }
}

// Where a block goes that nobody held: behind the worker's last one, if that run is all its own, or into a new run.
Place PrefixIndex::place_new(Place last, size_t tier, uint32_t worker, uint64_t hash) {
    Place place{last.run, last.offset + 1};
    if (last.run == kNoRun || place.offset >= kRunBlocks || (runs_[last.run].live & bit(place.offset)) != 0 ||
        !only_held_by(runs_[last.run], worker, tier)) {
        place = Place{new_run(), 0};
        make_holders(runs_[place.run], tier).whole.add(worker);
        enter(place.run, tier, worker);
    }
    put_hash(runs_[place.run], place.offset, hash);
    runs_[place.run].live |= bit(place.offset);
    ++workers_[worker].held[tier];
    workers_[worker].told[tier].add(hash);
    return place;
}

// Forget one run that was not matched since the hand last came by. Returns whether there was one.
bool PrefixIndex::make_room(uint32_t kept_run) {
    for (size_t tries = 2 * runs_.size(); tries > 0; --tries) {
        clock_hand_ = clock_hand_ + 1 < runs_.size() ? clock_hand_ + 1 : 0;
        Run& run = runs_[clock_hand_];
        if (run.live == 0 || clock_hand_ == kept_run) continue;
        if (run.matched) {
            run.matched = false;
            continue;
        }
        forget_run(static_cast<uint32_t>(clock_hand_));
        return true;
    }
    return false;
}

void PrefixIndex::forget_run(uint32_t number) {
    Run& run = runs_[number];
    for (size_t tier = 0; tier < kTierCount; ++tier) {
        const Holders* holders = holders_of(run, tier);
        if (holders == nullptr) break;
        const auto drop = [&](uint32_t worker, uint64_t mask) {
            workers_[worker].held[tier] -= popcount(mask);
            leave(tier, worker);
        };
        holders->whole.for_each([&](uint32_t worker) { drop(worker, run.live); });
        if (!holders->parts) continue;
        for (const Part& part : *holders->parts) drop(part.worker, part.mask);
    }
    for (uint64_t rest = run.live; rest != 0; rest &= rest - 1) table_.erase(run.hashes[lowest(rest)]);
    forgotten_ += popcount(run.live);
    free_run(number);
}

// What workers tell

void PrefixIndex::store(uint32_t worker, size_t tier, const uint64_t* hashes, size_t count) {
    if (worker >= workers_.size()) workers_.resize(worker + 1);
    if (count == 0) return;
    const Last& last = workers_[worker].last;
    Place at{kNoRun, 0};
    if (last.place.run != kNoRun && is_at(last.place, last.hash)) at = last.place;
    uint64_t pending = 0;  // of the run `at` is in: known blocks that the worker holds from now on
    for (size_t i = 0; i < count; ++i) {
        const uint64_t hash = hashes[i];
        if (at.run != kNoRun && is_at(Place{at.run, at.offset + 1}, hash)) {
            pending |= bit(++at.offset);
            continue;
        }
        if (i + kProbesAhead < count) table_.prefetch(hashes[i + kProbesAhead]);
        if (table_.size() >= capacity_ && table_.find(hash) == nullptr) {
            if (pending != 0) add(at.run, tier, worker, pending);
            pending = 0;
            if (!make_room(at.run)) {
                forgotten_ += count - i;
                for (; i < count; ++i) {
                    if (!holds(worker, tier, hashes[i])) workers_[worker].told[tier].add(hashes[i]);
                }
                break;
            }
        }
        bool is_new = false;
        Place* const found = table_.find_or_add(hash, is_new);
        if (pending != 0 && (is_new || found->run != at.run)) {
            add(at.run, tier, worker, pending);
            pending = 0;
        }
        if (is_new) {
            *found = at = place_new(at, tier, worker, hash);
        } else {
            at = *found;
            pending |= bit(at.offset);
        }
    }
    if (pending != 0) add(at.run, tier, worker, pending);
    if (at.run != kNoRun) workers_[worker].last = Last{at, runs_[at.run].hashes[at.offset]};
}

void PrefixIndex::remove(uint32_t worker, size_t tier, const uint64_t* hashes, size_t count) {
    if (worker >= workers_.size()) return;
    uint32_t number = kNoRun, offset = 0;
    uint64_t pending = 0;
    for (size_t i = 0; i < count; ++i) {
        const uint64_t hash = hashes[i];
        if (number != kNoRun && is_at(Place{number, offset + 1}, hash)) {
            ++offset;
        } else if (number != kNoRun && offset > 0 && is_at(Place{number, offset - 1}, hash)) {
            --offset;
        } else {
            const Place* place = table_.find(hash);
            if (place == nullptr) {
                withdraw(tier, worker, hash);
                continue;
            }
            if (place->run != number) {
                const Place found = *place;  // taking changes the table
                if (pending != 0) give_up(number, tier, worker, pending);
                pending = 0;
                number = found.run;
                offset = found.offset;
            } else {
                offset = place->offset;
            }
        }
        pending |= bit(offset);
    }
    if (pending != 0) give_up(number, tier, worker, pending);
}

void PrefixIndex::clear(uint32_t worker) {
    if (worker >= workers_.size()) return;
    const std::vector<uint32_t> listed = std::move(workers_[worker].run_list);
    workers_[worker].run_list.clear();
    for (const uint32_t number : listed) {
        for (size_t tier = 0; tier < kTierCount; ++tier) take(number, tier, worker, ~uint64_t{0});
    }
    workers_[worker].told = {};
}

// What a prompt asks

void PrefixIndex::match(Chain& chain, Depths& depths) {
    const size_t size = chain.size();
    depths.worker_count = workers_.size();
    depths.level_count = lower_entered_ > 0 ? kTierCount : 1;
    depths.depth.assign(depths.worker_count * depths.level_count, 0);
    const size_t word_count = (depths.worker_count + 63) / 64;
    for (size_t level = 0; level < depths.level_count; ++level) alive_[level].assign(word_count, ~uint64_t{0});
    steps_.clear();
    size_t position = 0;
    // Most runs are full, so the places of the next two are looked up while this one is compared: memory answers meanwhile.
    struct Guess {
        size_t position;
        const Place* place;
    };
    Guess next{0, nullptr}, later{0, nullptr};
    const Place* place = size > 0 ? table_.find(chain.at(0)) : nullptr;
    while (place != nullptr) {
        Run& run = runs_[place->run];
        run.matched = true;
        const uint64_t live = run.live >> place->offset;
        const size_t limit = std::min<size_t>(size - position, ~live == 0 ? kRunBlocks : lowest(~live));
        const size_t end = position + limit;
        const auto guess = [&](size_t at) { return Guess{at, at < size ? table_.find(chain.at(at)) : nullptr}; };
        if (end + 2 * kRunBlocks < size) table_.prefetch(chain.at(end + 2 * kRunBlocks));
        next = later.position == end ? later : guess(end);
        later = guess(end + kRunBlocks);
        if (later.place != nullptr) __builtin_prefetch(&runs_[later.place->run]);
        if (next.place != nullptr) prefetch_words(runs_[next.place->run].hashes.get() + next.place->offset, kRunBlocks);
        const size_t equal = follow(run, place->offset, chain, position, limit);
        steps_.push_back(Step{*place, static_cast<uint32_t>(equal)});
        bool has_survivors = false;
        for (size_t level = 0; level < depths.level_count; ++level) {
            has_survivors = survive(run, steps_.back(), position, level, depths);
        }
        if (!has_survivors) break;
        position += equal;
        place = equal == limit ? next.place : table_.find(chain.at(position));
    }
    for (size_t level = 0; level < depths.level_count && position > 0; ++level) {
        for (size_t word = 0; word < word_count; ++word) {
            for (uint64_t rest = alive_[level][word]; rest != 0; rest &= rest - 1) {
                depths.depth[level * depths.worker_count + 64 * word + lowest(rest)] = static_cast<uint32_t>(position);
            }
        }
    }
    // Sixteen blocks a step are few steps; with fewer, putting the runs in order pays for itself at the next match.
    if (steps_.size() * 16 > position + 32 && steps_.size() > 1) weave(chain.range(0, position));
}

// How many blocks of the prompt from `position` on, at most `limit`, the run has from `offset` on; the first of them is there.
size_t PrefixIndex::follow(Run& run, uint32_t offset, Chain& chain, size_t position, size_t limit) {
    const uint64_t* known = run.hashes.get() + offset;
    const uint64_t behind = offset + 1 < kRunBlocks ? run.linked >> (offset + 1) : 0;
    const size_t linked = std::min<size_t>(limit, 1 + (~behind == 0 ? kRunBlocks : lowest(~behind)));
    if (linked > 1 && known[linked - 1] != chain.at(position + linked - 1)) {
        size_t same = 0, different = linked - 1;
        while (different - same > 1) {
            const size_t middle = (same + different) / 2;
            (known[middle] == chain.at(position + middle) ? same : different) = middle;
        }
        return different;
    }
    if (linked == limit) return limit;
    const uint64_t* hashes = chain.range(position + linked, position + limit) - linked;
    size_t equal = linked;
    while (equal < limit && known[equal] == hashes[equal]) ++equal;
    run.linked |= (ones(equal) & ~ones(linked)) << offset;
    return equal;
}

// Of the workers alive on this level, keep those that hold all of the step's blocks; note how far the others came.
bool PrefixIndex::survive(const Run& run, const Step& step, size_t position, size_t level, Depths& depths) {
    std::vector<uint64_t>& alive = alive_[level];
    uint32_t* depth = depths.depth.data() + level * depths.worker_count;
    survivors_.assign(alive.size(), 0);
    for (size_t tier = 0; tier <= level; ++tier) {
        const Holders* holders = holders_of(run, tier);
        if (holders != nullptr) holders->whole.intersect_into(alive.data(), survivors_.data(), alive.size());
    }
    const uint64_t wanted = ones(step.block_count);
    for (size_t tier = 0; tier <= level; ++tier) {
        const Holders* holders = holders_of(run, tier);
        if (holders == nullptr || !holders->parts) continue;
        for (const Part& part : *holders->parts) {
            const uint64_t worker_bit = uint64_t{1} << (part.worker % 64);
            const size_t word = part.worker / 64;
            if (!(alive[word] & worker_bit) || (survivors_[word] & worker_bit)) continue;
            uint64_t mask = part.mask;
            for (size_t other = 0; level > 0 && other <= level; ++other) mask |= mask_of(run, other, part.worker);
            const uint64_t lacking = wanted & ~(mask >> step.place.offset);
            if (lacking == 0) {
                survivors_[word] |= worker_bit;
            } else {
                depth[part.worker] = static_cast<uint32_t>(position) + lowest(lacking);
                alive[word] &= ~worker_bit;
            }
        }
    }
    uint64_t any = 0;
    for (size_t word = 0; word < alive.size(); ++word) {
        any |= survivors_[word];
        if (position == 0) continue;
        for (uint64_t rest = alive[word] & ~survivors_[word]; rest != 0; rest &= rest - 1) {
            depth[64 * word + lowest(rest)] = static_cast<uint32_t>(position);
        }
    }
    alive.swap(survivors_);
    return any != 0;
}

// Putting scattered blocks in order, for the next match

bool PrefixIndex::is_at(Place place, uint64_t hash) const {
    const Run& run = runs_[place.run];
    return place.offset < kRunBlocks && (run.live >> place.offset & 1) != 0 && run.hashes[place.offset] == hash;
}

bool PrefixIndex::can_follow(Place last, Place next) const {
    const Run& run = runs_[last.run];
    return last.run != next.run && last.offset + 1 < kRunBlocks && !(run.live & bit(last.offset + 1)) &&
           held_alike(run, runs_[next.run], next.offset);
}

// `hashes` were just matched in `steps_`. Blocks with the same holders as those before them move up behind them.
void PrefixIndex::weave(const uint64_t* hashes) {
    Place last{kNoRun, 0};
    size_t position = 0;
    for (const Step& step : steps_) {
        // A prompt that names a block twice may find it moved.
        for (uint32_t i = 0; i < step.block_count; ++i) {
            if (!is_at(Place{step.place.run, step.place.offset + i}, hashes[position + i])) return;
        }
        uint32_t moved = 0;
        while (last.run != kNoRun && moved < step.block_count) {
            const Place from{step.place.run, step.place.offset + moved};
            if (!can_follow(last, from)) break;
            ++last.offset;
            move_block(from, last, hashes[position + moved]);
            runs_[last.run].linked |= bit(last.offset);
            ++moved;
        }
        if (moved < step.block_count) {
            const uint32_t end = step.place.offset + step.block_count - 1;
            last = Place{step.place.run, end};
            const bool has_stranger_behind = end + 1 < kRunBlocks && (runs_[last.run].live & bit(end + 1)) != 0;
            const bool is_last = &step == &steps_.back();
            if (moved == 0 && has_stranger_behind && step.block_count <= 4 && !is_last) {
                last = Place{split_off(step, hashes + position), step.block_count - 1};
            }
        }
        position += step.block_count;
    }
}

// The block is going elsewhere with its holders; the run may be freed.
void PrefixIndex::detach(uint32_t number, uint32_t offset) {
    Run& run = runs_[number];
    run.live &= ~bit(offset);
    for (size_t tier = 0; tier < kTierCount; ++tier) {
        Holders* holders = holders_of(run, tier);
        if (holders == nullptr) break;
        if (run.live == 0) holders->whole.for_each([&](uint32_t worker) { leave(tier, worker); });
        if (!holders->parts) continue;
        auto kept = holders->parts->begin();
        for (Part& part : *holders->parts) {
            part.mask &= ~bit(offset);
            if (part.mask != 0) {
                *kept++ = part;
            } else {
                leave(tier, part.worker);
            }
        }
        holders->parts->erase(kept, holders->parts->end());
        if (holders->parts->empty()) holders->parts.reset();
    }
    if (run.live == 0) {
        free_run(number);
    } else {
        settle(run);
    }
}

void PrefixIndex::move_block(Place from, Place to, uint64_t hash) {
    put_hash(runs_[to.run], to.offset, hash);
    runs_[to.run].live |= bit(to.offset);
    table_.move(hash, to);
    detach(from.run, from.offset);
}

// A run of its own for a step's blocks that have the same holders as the first one. Returns its number.
uint32_t PrefixIndex::split_off(const Step& step, const uint64_t* hashes) {
    const uint32_t number = new_run();
    const Place from = step.place;
    for (size_t tier = 0; tier < kTierCount; ++tier) {
        const Holders* holders = holders_of(runs_[from.run], tier);
        if (holders == nullptr) break;
        std::vector<uint32_t> workers;
        holders->whole.for_each([&](uint32_t worker) { workers.push_back(worker); });
        if (holders->parts) {
            for (const Part& part : *holders->parts) {
                if (part.mask & bit(from.offset)) workers.push_back(part.worker);
            }
        }
        for (const uint32_t worker : workers) {
            make_holders(runs_[number], tier).whole.add(worker);
            enter(number, tier, worker);
        }
    }
    move_block(from, Place{number, 0}, hashes[0]);
    for (uint32_t i = 1; i < step.block_count; ++i) {
        const Place next{from.run, from.offset + i};
        if (!can_follow(Place{number, i - 1}, next)) break;
        move_block(next, Place{number, i}, hashes[i]);
        runs_[number].linked |= bit(i);
    }
    return number;
}

// For people and tests

size_t PrefixIndex::heap_bytes() const {
    // Of very many runs some are looked at: whoever asks must not wait.
    const size_t stride = runs_.size() / kRunsSized + 1;
    size_t bytes = 0;
    for (size_t number = 0; number < runs_.size(); number += stride) {
        const Run& run = runs_[number];
        if (run.room > 0) bytes += run.room * sizeof(uint64_t) + 16;  // 16: what malloc adds
        if (run.lower) bytes += sizeof(*run.lower) + 16;
        for (size_t tier = 0; tier < kTierCount; ++tier) {
            const Holders* holders = holders_of(run, tier);
            if (holders == nullptr) break;
            bytes += holders->whole.heap_bytes();
            if (holders->parts) bytes += sizeof(*holders->parts) + holders->parts->capacity() * sizeof(Part) + 32;
        }
    }
    bytes = bytes * stride + table_.heap_bytes() + runs_.capacity() * sizeof(Run) + free_runs_.capacity() * sizeof(uint32_t);
    for (const Worker& worker : workers_) bytes += sizeof worker + worker.run_list.capacity() * sizeof(uint32_t);
    return bytes;
}

void PrefixIndex::check() const {
    std::vector<std::array<size_t, kTierCount>> held(workers_.size());
    std::vector<std::array<uint64_t, kTierCount>> sums(workers_.size());
    std::vector<size_t> entered(workers_.size());
    size_t live = 0, free = 0, lower = 0;
    for (uint32_t number = 0; number < runs_.size(); ++number) {
        const Run& run = runs_[number];
        live += popcount(run.live);
        if (run.live == 0) ++free;
        require(held_by_anybody(run) == run.live, "a live block is held by nobody, or a dead one by somebody");
        for (uint64_t rest = run.live; rest != 0; rest &= rest - 1) {
            const Place* place = table_.find(run.hashes[lowest(rest)]);
            require(place != nullptr && place->run == number && place->offset == lowest(rest), "the table does not lead to a block");
        }
        for (size_t tier = 0; tier < kTierCount; ++tier) {
            const Holders* holders = holders_of(run, tier);
            if (holders == nullptr) break;
            size_t counted = 0;
            const auto count = [&](uint32_t worker, uint64_t mask) {
                held[worker][tier] += popcount(mask);
                for (uint64_t rest = mask; rest != 0; rest &= rest - 1) sums[worker][tier] += mixed(run.hashes[lowest(rest)]);
                ++entered[worker];
                if (tier > 0) ++lower;
                const auto& listed = workers_[worker].run_list;
                require(std::find(listed.begin(), listed.end(), number) != listed.end(), "a worker's list lacks a run that it holds");
            };
            holders->whole.for_each([&](uint32_t worker) {
                ++counted;
                count(worker, run.live);
            });
            require(counted == holders->whole.size(), "a set has another size than it says");
            if (!holders->parts) continue;
            require(!holders->parts->empty(), "an empty list of parts is kept");
            for (size_t i = 0; i < holders->parts->size(); ++i) {
                const Part& part = (*holders->parts)[i];
                require(part.mask != 0 && part.mask != run.live && (part.mask & ~run.live) == 0, "a part is none");
                require(!holders->whole.contains(part.worker), "a worker holds a run whole and in part");
                require(i == 0 || (*holders->parts)[i - 1].worker < part.worker, "parts are out of order");
                count(part.worker, part.mask);
            }
        }
    }
    require(live == table_.size() && live <= capacity_, "the table holds other blocks than the runs");
    require(free == free_runs_.size(), "a free run is not on the list");
    require(lower == lower_entered_, "the count of lower tiers is wrong");
    for (size_t worker = 0; worker < workers_.size(); ++worker) {
        require(held[worker] == workers_[worker].held, "a worker's count of blocks is wrong");
        require(entered[worker] == workers_[worker].entered, "a worker's count of runs is wrong");
        for (size_t tier = 0; tier < kTierCount; ++tier) {
            const Told& told = workers_[worker].told[tier];
            require(told.count >= held[worker][tier], "a worker holds more than it was told to");
            require(forgotten_ > 0 || (told.count == held[worker][tier] && told.sum == sums[worker][tier]), "a worker's digest is wrong");
        }
    }
}

}  // namespace polyphase
