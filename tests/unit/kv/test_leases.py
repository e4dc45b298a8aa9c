"""Leases end once: by release or by time."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from polyphase.core.errors import KvError
from polyphase.core.ids import BlockId
from polyphase.kv import LeaseTable


def test_an_unknown_lease_is_nothing_to_release() -> None:
    assert LeaseTable().release("gone") is None


def test_a_name_is_taken_while_its_lease_lives() -> None:
    table = LeaseTable()
    table.acquire("a", [BlockId(1)], 10)
    with pytest.raises(KvError, match="exists already"):
        table.acquire("a", [BlockId(2)], 20)
    table.release("a")
    table.acquire("a", [BlockId(2)], 20)
    assert table.next_expiry_ns == 20


class LeaseMachine(RuleBasedStateMachine):
    """Against a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable()
        self.model: dict[str, tuple[list[int], int]] = {}
        self.now_ns = 0

    @rule(name=st.sampled_from("abcdef"), blocks=st.lists(st.integers(0, 9), unique=True), duration_ns=st.integers(0, 5))
    def acquire(self, name: str, blocks: list[int], duration_ns: int) -> None:
        if name in self.model:
            return
        self.table.acquire(name, [BlockId(b) for b in blocks], self.now_ns + duration_ns)
        self.model[name] = (blocks, self.now_ns + duration_ns)

    @rule(name=st.sampled_from("abcdef"))
    def release(self, name: str) -> None:
        lease = self.table.release(name)
        expected = self.model.pop(name, None)
        assert (lease is None) == (expected is None)
        if lease is not None and expected is not None:
            assert list(lease.block_ids) == expected[0]

    @rule(duration_ns=st.integers(0, 4))
    def pass_time(self, duration_ns: int) -> None:
        self.now_ns += duration_ns
        ended = self.table.expire(self.now_ns)
        due = {name for name, (_, expiry_ns) in self.model.items() if expiry_ns <= self.now_ns}
        assert {lease.lease_id for lease in ended} == due
        assert [lease.expires_at_ns for lease in ended] == sorted(lease.expires_at_ns for lease in ended)
        for name in due:
            del self.model[name]

    @invariant()
    def agrees(self) -> None:
        assert len(self.table) == len(self.model)
        assert self.table.block_count == len({b for blocks, _ in self.model.values() for b in blocks})
        assert self.table.next_expiry_ns == min((expiry_ns for _, expiry_ns in self.model.values()), default=None)


TestLeaseMachine = LeaseMachine.TestCase
TestLeaseMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
