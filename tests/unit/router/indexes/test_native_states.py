"""The native index against the naive one: any order of changes, few hashes so that they meet often, all invariants after each step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from polyphase.core.digest import digest_sum
from polyphase.core.ids import SequenceHash, WorkerId
from polyphase.router.indexes import NaivePrefixIndex, native_index
from polyphase.wire.events import Tier

WORKERS = st.sampled_from([WorkerId(f"w{number}") for number in range(5)])
TIERS = st.sampled_from([Tier.DEVICE, Tier.DEVICE, Tier.DEVICE, Tier.HOST, Tier.OBJECT])
CHAIN_COUNT, CHAIN_LENGTH = 4, 150


def chain(name: int, start: int, length: int) -> list[SequenceHash]:
    """Chains share a beginning: up to block 20 all are one, up to block 70 pairs of them are."""
    return [
        SequenceHash((0 if position < 20 else name // 2 + 10 if position < 70 else name + 100) * 1000 + position)
        for position in range(start, min(start + length, CHAIN_LENGTH))
    ]


# As prompts do, they never name a hash behind another one than that which comes before it in its chain.
CHAINS = st.builds(chain, st.integers(0, CHAIN_COUNT - 1), st.integers(0, 100), st.integers(0, CHAIN_LENGTH))
PROMPTS = st.builds(chain, st.integers(0, CHAIN_COUNT - 1), st.just(0), st.integers(0, CHAIN_LENGTH))
COLLIDING = st.lists(st.integers(0, 12).map(SequenceHash), max_size=12)  # in no order, some twice
HASHES = st.one_of(
    PROMPTS, CHAINS, COLLIDING, CHAINS.map(lambda hashes: hashes[::-1]), CHAINS.flatmap(st.permutations), CHAINS.map(lambda h: h[::3])
)


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.native = native_index(100_000)
        self.naive = NaivePrefixIndex(100_000)

    @rule(worker_id=WORKERS, hashes=HASHES, tier=TIERS)
    def store(self, worker_id: WorkerId, hashes: list[SequenceHash], tier: Tier) -> None:
        self.native.store(worker_id, hashes, tier)
        self.naive.store(worker_id, hashes, tier)

    @rule(worker_ids=st.sets(WORKERS), hashes=PROMPTS)
    def share(self, worker_ids: set[WorkerId], hashes: list[SequenceHash]) -> None:
        for worker_id in worker_ids:
            self.store(worker_id, hashes, Tier.DEVICE)

    @rule(worker_id=WORKERS, hashes=HASHES, tier=TIERS)
    def remove(self, worker_id: WorkerId, hashes: list[SequenceHash], tier: Tier) -> None:
        self.native.remove(worker_id, hashes, tier)
        self.naive.remove(worker_id, hashes, tier)

    @precondition(lambda self: self.naive.size > 50)
    @rule(worker_id=WORKERS)
    def clear(self, worker_id: WorkerId) -> None:
        self.native.clear(worker_id)
        self.naive.clear(worker_id)

    @rule(prompt=st.one_of(PROMPTS, CHAINS))
    def match(self, prompt: list[SequenceHash]) -> None:
        ours, truth = self.native.match(prompt), self.naive.match(prompt)
        for tier in Tier:
            assert ours.as_dict(tier) == truth.as_dict(tier)

    @invariant()
    def same_counts(self) -> None:
        self.native.check()  # type: ignore[attr-defined]
        assert self.native.size == self.naive.size
        for number in range(5):
            for tier in Tier:
                worker_id = WorkerId(f"w{number}")
                assert self.native.block_count(worker_id, tier) == self.naive.block_count(worker_id, tier)
                assert self.native.digest(worker_id, tier) == self.naive.digest(worker_id, tier)

    def teardown(self) -> None:
        for name in range(CHAIN_COUNT):
            self.match(chain(name, 0, CHAIN_LENGTH))
            self.match(chain(name, 0, CHAIN_LENGTH))  # in the order that the first one made
        self.same_counts()


IndexMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestIndexStates = IndexMachine.TestCase

SETS = st.lists(st.integers(0, 80).map(SequenceHash), max_size=12, unique=True)
TOLD_ONCE = st.lists(st.tuples(st.sampled_from(["store", "remove", "match"]), WORKERS, SETS, TIERS), max_size=40)


@settings(max_examples=80, deadline=None)
@given(TOLD_ONCE, st.integers(1, 60))
def test_a_full_index_forgets_but_its_digests_do_not(changes: list[tuple[str, WorkerId, list[SequenceHash], Tier]], capacity: int):
    """As long as a worker tells each block once when it comes and once when it goes, as the publisher does."""
    indexes = [native_index(capacity), NaivePrefixIndex(capacity)]
    truth: dict[tuple[WorkerId, Tier], set[SequenceHash]] = {}
    for change, worker_id, hashes, tier in changes:
        held = truth.setdefault((worker_id, tier), set())
        told = [one for one in hashes if (one in held) == (change == "remove")]
        for index in indexes:
            if change == "match":
                index.match(hashes)
            else:
                getattr(index, change)(worker_id, told, tier)
        if change == "store":
            held.update(told)
        elif change == "remove":
            held.difference_update(told)
        for (named, matched), blocks in truth.items():
            assert [index.digest(named, matched) for index in indexes] == [(len(blocks), digest_sum(blocks))] * 2


KINDS = st.sampled_from(["store", "remove", "match"])
CHANGES = st.lists(st.tuples(KINDS, WORKERS, HASHES, st.one_of(PROMPTS, CHAINS), TIERS), max_size=25)


@settings(max_examples=80, deadline=None)
@given(CHANGES, st.integers(1, 60))
def test_a_full_index_forgets_but_never_invents(
    changes: list[tuple[str, WorkerId, list[SequenceHash], list[SequenceHash], Tier]], capacity: int
):
    small, truth = native_index(capacity), NaivePrefixIndex(100_000)
    for change, worker_id, hashes, prompt, tier in changes:
        if change == "match":
            found, possible = small.match(prompt), truth.match(prompt)
            for matched in Tier:
                assert all(depth <= possible.depth(name, matched) for name, depth in found.as_dict(matched).items())
        else:
            getattr(small, change)(worker_id, hashes, tier)
            getattr(truth, change)(worker_id, hashes, tier)
        small.check()  # type: ignore[attr-defined]
        assert small.size <= capacity


def test_hashes_that_are_none_are_refused_and_change_nothing():
    index = native_index(100)
    worker_id = WorkerId("w")
    index.store(worker_id, [SequenceHash(1), SequenceHash(2)])
    for wrong, error in (
        ([1, -1], OverflowError),
        ([1, 2**64], OverflowError),
        ([1, "2"], TypeError),
        ([1, 2.0], TypeError),
        (5, TypeError),
    ):
        for call in (index.match, lambda hashes: index.store(worker_id, hashes), lambda hashes: index.remove(worker_id, hashes)):
            with pytest.raises(error):
                call(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device, host, disk and object"):
        index.store(worker_id, [SequenceHash(3)], "tape")  # type: ignore[arg-type]
    assert index.match([SequenceHash(1), SequenceHash(2), SequenceHash(3)]).as_dict() == {worker_id: 2}
    index.check()  # type: ignore[attr-defined]
