from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from polyphase.core.ids import SequenceHash, WorkerId
from polyphase.router.indexes import PredictedPrefixIndex
from tests.unit.router.builders import prefix

A, B = WorkerId("a"), WorkerId("b")


def test_what_was_routed_is_believed_for_a_while():
    index = PredictedPrefixIndex(1000, lifetime_ns=100)
    index.expect(A, prefix(1, 4), now_ns=0)
    index.expect(B, prefix(1, 2), now_ns=60)
    assert index.match(prefix(1, 4)).as_dict() == {A: 4, B: 2}
    index.expire(99)
    assert index.match(prefix(1, 4)).as_dict() == {A: 4, B: 2}
    index.expire(100)
    assert index.match(prefix(1, 4)).as_dict() == {B: 2}
    index.expire(1000)
    assert index.size == 0


def test_what_is_expected_again_stays():
    index = PredictedPrefixIndex(1000, lifetime_ns=100)
    index.expect(A, prefix(1, 4), now_ns=0)
    index.expect(A, prefix(1, 2), now_ns=50)
    index.expire(120)
    assert index.match(prefix(1, 4)).as_dict() == {A: 2}


def test_time_does_not_run_backwards():
    index = PredictedPrefixIndex(1000, lifetime_ns=100)
    index.expect(A, prefix(1, 4), now_ns=500)
    index.expect(B, prefix(2, 4), now_ns=100)
    index.expire(599)
    assert index.match(prefix(2, 4)).as_dict() == {B: 4}


def test_without_room_the_oldest_expectation_goes():
    index = PredictedPrefixIndex(10, lifetime_ns=100)
    for name in range(4):
        index.expect(A, prefix(name, 4), now_ns=name)
    assert [index.match(prefix(name, 4)).depth(A) for name in range(4)] == [0, 0, 4, 4]
    assert (index.size, index.forgotten) == (8, 8)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="positive"):
        PredictedPrefixIndex(10, lifetime_ns=0)


WORKERS = st.sampled_from([A, B])
HASHES = st.lists(st.integers(0, 9).map(SequenceHash), max_size=8)


class PredictedMachine(RuleBasedStateMachine):
    """Against a dict of the times at which beliefs end. Large enough that nothing is forgotten for want of room."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PredictedPrefixIndex(1000, lifetime_ns=50)
        self.ends: dict[WorkerId, dict[SequenceHash, int]] = {A: {}, B: {}}
        self.now = 0

    @rule(worker_id=WORKERS, hashes=HASHES, later=st.integers(0, 30))
    def expect(self, worker_id: WorkerId, hashes: list[SequenceHash], later: int) -> None:
        self.now += later
        self.index.expect(worker_id, hashes, self.now)
        self.ends[worker_id].update(dict.fromkeys(hashes, self.now + 50))

    @rule(worker_id=WORKERS, hashes=HASHES)
    def remove(self, worker_id: WorkerId, hashes: list[SequenceHash]) -> None:
        self.index.remove(worker_id, hashes)
        for one in hashes:
            self.ends[worker_id].pop(one, None)

    @rule(worker_id=WORKERS)
    def clear(self, worker_id: WorkerId) -> None:
        self.index.clear(worker_id)
        self.ends[worker_id].clear()

    @rule(later=st.integers(0, 60))
    def expire(self, later: int) -> None:
        self.now += later
        self.index.expire(self.now)

    @invariant()
    def believes_what_has_not_ended(self) -> None:
        believed = 0
        for worker_id, ends in self.ends.items():
            held = {one for one, end in ends.items() if end > self.now}
            believed += len(held)
            assert self.index.block_count(worker_id) == len(held)
            assert all(self.index.match([one]).depth(worker_id) == (one in held) for one in map(SequenceHash, range(10)))
        assert self.index.size == believed


PredictedMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestPredictedStates = PredictedMachine.TestCase
