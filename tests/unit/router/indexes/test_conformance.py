"""What every prefix index does, whatever it is made of."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable

import pytest

from polyphase.core.digest import digest_sum
from polyphase.core.ids import SequenceHash, WorkerId
from polyphase.router import PredictedPrefixIndex, PrefixIndex
from polyphase.wire.events import Tier
from tests.unit.router.builders import prefix

A, B, C = WorkerId("a"), WorkerId("b"), WorkerId("c")
MakeIndex = Callable[[int], PrefixIndex]


def test_depth_is_of_leading_blocks_only(index: PrefixIndex):
    prompt = prefix(1, 4)
    index.store(A, prompt)
    index.store(B, [prompt[0], prompt[2], prompt[3]])  # block 1 was evicted: 2 and 3 are of no use

    assert index.match(prompt).as_dict() == {A: 4, B: 1}
    assert index.match(prompt[:2]).as_dict() == {A: 2, B: 1}
    assert index.match(prompt[1:]).as_dict() == {A: 3}
    assert index.match(prefix(2, 4)).as_dict() == {}
    assert index.match([]).as_dict() == {}


def test_the_same_answer_in_three_forms(index: PrefixIndex):
    index.store(A, prefix(1, 4))
    index.store(B, prefix(1, 2))
    overlaps = index.match(prefix(1, 9))
    assert overlaps.as_dict() == {A: 4, B: 2}
    assert [overlaps.depth(worker) for worker in (A, B, C)] == [4, 2, 0]
    for worker_ids in ((B, C, A), [B, C, A]):
        assert overlaps.depths(worker_ids) == [2, 0, 4]
        assert overlaps.depths(worker_ids) == [2, 0, 4]


def test_tokens_behind_what_is_held(index: PrefixIndex):
    index.store(A, prefix(1, 4))
    index.store(B, prefix(1, 2))
    index.store(C, prefix(1, 3), Tier.HOST)
    overlaps = index.match(prefix(1, 4))
    assert list(overlaps.tokens_beyond((A, B, C), 16, 70)) == [6, 38, 70]
    assert list(overlaps.tokens_beyond([A, B], 16, 64, at_least=1)) == [1, 32]
    assert list(overlaps.tokens_beyond((A, B), 16, 40)) == [0, 8]
    assert list(overlaps.tokens_beyond((A, C), 16, 70, tier=Tier.HOST)) == [6, 22]
    assert (overlaps.level_count > 1, index.match(prefix(9, 4)).level_count >= 1) == (True, True)


def test_an_answer_keeps_what_was_true(index: PrefixIndex):
    order = (A, B, C)
    index.store(A, prefix(1, 4))
    index.store(B, prefix(1, 2))
    overlaps = index.match(prefix(1, 4))
    assert overlaps.depths(order) == [4, 2, 0]
    index.clear(A)
    index.store(C, prefix(2, 3))  # perhaps under A's number
    index.store(B, prefix(1, 4))
    assert overlaps.as_dict() == {A: 4, B: 2}
    assert overlaps.depths(order) == [4, 2, 0]
    assert index.match(prefix(1, 4)).depths(order) == [0, 4, 0]
    assert index.match(prefix(2, 4)).depths(order) == [0, 0, 3]


def test_clear_forgets_one_worker_only(index: PrefixIndex):
    index.store(A, prefix(1, 3))
    index.store(A, prefix(1, 3), Tier.HOST)
    index.store(B, prefix(1, 2))
    index.clear(A)
    index.clear(A)
    index.clear(C)
    assert index.match(prefix(1, 3)).as_dict(Tier.OBJECT) == {B: 2}
    assert [index.block_count(A), index.block_count(A, Tier.HOST), index.block_count(B)] == [0, 0, 2]


def test_removing_what_is_not_held_changes_nothing(index: PrefixIndex):
    index.store(A, prefix(1, 1))
    index.remove(A, prefix(2, 1))
    index.remove(A, prefix(1, 1), Tier.HOST)
    index.remove(B, prefix(1, 1))
    assert index.match(prefix(1, 1)).as_dict() == {A: 1}
    assert index.size == 1


def test_storing_twice_counts_once(index: PrefixIndex):
    twice = prefix(1, 3) + prefix(1, 3)
    index.store(A, twice)
    index.store(A, prefix(1, 3))
    assert (index.block_count(A), index.match(twice).as_dict()) == (3, {A: 6})
    index.remove(A, twice)
    assert (index.block_count(A), index.size) == (0, 0)


def test_any_iterable_is_stored_and_buffers_are_matched(index: PrefixIndex):
    index.store(A, iter(prefix(1, 3)))
    index.store(B, tuple(prefix(1, 2)))
    index.remove(B, (one for one in prefix(1, 2)[1:]))
    assert index.match(prefix(1, 3)).as_dict() == {A: 3, B: 1}
    assert index.match(array("Q", prefix(1, 3))).as_dict() == {A: 3, B: 1}


def test_all_hashes_of_64_bits(index: PrefixIndex):
    odd = [SequenceHash(one) for one in (0, 2**64 - 1, 1, 2**63, 2**60, 2**30, 2**30 - 1, 2**32)]
    index.store(A, odd)
    assert index.match(odd).as_dict() == {A: len(odd)}
    index.remove(A, odd[3:4])
    assert index.match(odd).as_dict() == {A: 3}


def test_tiers_add_up_from_the_fastest(index: PrefixIndex):
    prompt = prefix(1, 10)
    index.store(A, prompt[:2] + prompt[3:4])
    index.store(A, prompt[2:5], Tier.HOST)
    index.store(A, prompt[5:6] + prompt[7:8], Tier.DISK)
    index.store(A, prompt[6:7], Tier.OBJECT)
    index.store(B, prompt[:4], Tier.DISK)
    overlaps = index.match(prompt)
    assert [overlaps.depth(A, tier) for tier in Tier] == [2, 5, 6, 8]
    assert [overlaps.depth(B, tier) for tier in Tier] == [0, 0, 4, 4]
    assert overlaps.depths((A, B), Tier.DISK) == [6, 4]
    assert overlaps.as_dict(Tier.HOST) == {A: 5}
    assert [index.block_count(A, tier) for tier in Tier] == [3, 3, 2, 1]


def test_a_block_leaves_one_tier_and_stays_in_another(index: PrefixIndex):
    prompt = prefix(1, 4)
    index.store(A, prompt)
    index.store(A, prompt, Tier.HOST)
    index.remove(A, prompt[1:])
    overlaps = index.match(prompt)
    assert [overlaps.depth(A, tier) for tier in Tier] == [1, 4, 4, 4]
    index.remove(A, prompt, Tier.HOST)
    assert [index.match(prompt).depth(A, tier) for tier in Tier] == [1, 1, 1, 1]
    assert index.size == 1


def test_long_prompts_in_pieces_and_from_many_workers(index: PrefixIndex):
    prompt = prefix(1, 500)
    workers = [WorkerId(f"w{number}") for number in range(70)]
    for number, worker_id in enumerate(workers):
        depth = 500 - 7 * number
        for start in range(0, depth, 30 + number):
            index.store(worker_id, prompt[start : min(start + 30 + number, depth)])
    expected = {worker_id: 500 - 7 * number for number, worker_id in enumerate(workers)}
    assert index.match(prompt).as_dict() == expected
    index.remove(workers[0], prompt[100:101])
    index.remove(workers[1], prompt[:1])
    index.remove(workers[2], list(reversed(prompt[200:])))
    expected |= {workers[0]: 100, workers[2]: 200}
    del expected[workers[1]]
    assert index.match(prompt).as_dict() == expected
    index.store(workers[0], prompt[100:101])
    assert index.match(prompt).depth(workers[0]) == 500


def test_scattered_blocks_are_matched_again_and_again(index: PrefixIndex):
    """As after a snapshot without order, or when several sequences grow side by side."""
    rng = random.Random(1)
    chains = [prefix(name, 40) for name in range(6)]
    mixed = [one for chain in chains for one in chain]
    for worker_id in (A, B):
        rng.shuffle(mixed)
        index.store(worker_id, mixed)
    index.remove(B, chains[3][20:])
    for _ in range(3):
        for name, chain in enumerate(chains):
            assert index.match(chain).as_dict() == {A: 40, B: 20 if name == 3 else 40}
            assert index.match(chain[5:]).depth(A) == 35
    index.clear(A)
    assert index.match(chains[0]).as_dict() == {B: 40}
    assert index.size == index.block_count(B) == 220


def test_memory_is_bounded_and_what_is_forgotten_is_counted(make_index: MakeIndex):
    index = make_index(100)
    assert (index.capacity, index.size, index.forgotten) == (100, 0, 0)
    for name in range(10):
        index.store(A, prefix(name, 30))
        index.match(prefix(name, 30))
        assert index.size <= 100
    assert index.forgotten >= 200
    assert index.match(prefix(9, 30)).depth(A) == 30
    assert index.size == index.block_count(A)


def test_a_prompt_longer_than_the_index(make_index: MakeIndex):
    index = make_index(10)
    index.store(A, prefix(1, 25))
    assert index.size <= 10
    assert index.forgotten + index.size >= 10
    index.clear(A)
    assert (index.size, index.block_count(A)) == (0, 0)


def test_a_capacity_of_nothing_is_refused(make_index: MakeIndex):
    with pytest.raises(ValueError, match="capacity"):
        make_index(0)


def test_workers_come_and_go_without_leaving_anything(index: PrefixIndex):
    for number in range(300):
        worker_id = WorkerId(f"pod-{number}")
        index.store(worker_id, prefix(1, 8) + prefix(number + 2, 8))
        if number >= 2:
            index.clear(WorkerId(f"pod-{number - 2}"))
    assert index.match(prefix(1, 8)).as_dict() == {WorkerId("pod-298"): 8, WorkerId("pod-299"): 8}
    assert [index.block_count(WorkerId(f"pod-{number}")) for number in (0, 297, 298, 299)] == [0, 0, 16, 16]
    assert index.size <= 2 * 16


def digest_of(*hashes: SequenceHash) -> tuple[int, int]:
    return len(hashes), digest_sum(hashes)


def test_a_digest_tells_what_is_held_tier_by_tier(index: PrefixIndex):
    if isinstance(index, PredictedPrefixIndex):
        assert index.digest(A) is None
        return
    index.store(A, prefix(1, 5) + prefix(1, 3))
    index.store(A, prefix(1, 2), Tier.DISK)
    index.store(B, prefix(1, 5)[::-1])
    assert index.digest(A) == index.digest(B) == digest_of(*prefix(1, 5))
    index.remove(A, prefix(1, 5)[1:2] + prefix(2, 2))
    index.remove(A, prefix(1, 1), Tier.DISK)
    assert index.digest(A) == digest_of(prefix(1, 1)[0], *prefix(1, 5)[2:])
    assert index.digest(A, Tier.DISK) == digest_of(prefix(1, 2)[1])
    index.match(prefix(1, 5))
    index.clear(B)
    assert [index.digest(B), index.digest(C), index.digest(A, Tier.HOST)] == [(0, 0)] * 3


def test_what_is_forgotten_for_want_of_room_stays_in_the_digest(make_index: MakeIndex):
    index = make_index(40)
    if isinstance(index, PredictedPrefixIndex):
        return
    chains = [prefix(name, 30) for name in range(5)]
    for chain in chains:
        index.store(A, chain)
        index.store(B, chain[:10])
    assert index.forgotten >= 110
    for worker_id, depth in ((A, 30), (B, 10)):
        assert index.digest(worker_id) == digest_of(*(one for chain in chains for one in chain[:depth]))
        for chain in chains[1:]:
            index.remove(worker_id, chain[:depth])
        assert index.digest(worker_id) == digest_of(*chains[0][:depth])
        index.remove(worker_id, chains[0][:depth])
        assert index.digest(worker_id) == (0, 0)
