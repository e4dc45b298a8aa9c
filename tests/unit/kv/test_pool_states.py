"""The block pool against a naive model, in random histories."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from polyphase.core.ids import BlockId, ContentKey, SequenceHash
from polyphase.kv import BlockPool
from polyphase.wire.events import BlocksStored

BLOCK_COUNT = 6


class NaivePool:
    """Recomputes everything from lists: references, names, and the order in which blocks became idle."""

    def __init__(self) -> None:
        self.holders: dict[int, int] = dict.fromkeys(range(BLOCK_COUNT), 0)
        self.name: dict[int, int] = {}
        self.idle_order: list[int] = []

    def available(self) -> int:
        return sum(1 for count in self.holders.values() if count == 0)

    def may_be_given(self, count: int) -> list[int]:
        """The idle blocks that must have lost their names after `count` allocations."""
        free = sum(1 for block, held in self.holders.items() if held == 0 and block not in self.name)
        return self.idle_order[: max(0, count - free)]

    def drop(self, block: int) -> None:
        self.holders[block] -= 1
        if self.holders[block] == 0 and block in self.name:
            self.idle_order.append(block)


class PoolMachine(RuleBasedStateMachine):
    held = Bundle("held")  # one reference to each block of a tuple

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCK_COUNT)
        self.naive = NaivePool()
        self.listener: set[int] = set()

    @rule(target=held, count=st.integers(1, 3))
    def allocate(self, count: int) -> tuple[int, ...]:
        if count > self.naive.available():
            return ()
        evicted = self.naive.may_be_given(count)
        blocks = self.pool.allocate(count)
        for block in evicted:
            assert block in blocks
            del self.naive.name[block]
            self.naive.idle_order.remove(block)
        for block in blocks:
            assert self.naive.holders[block] == 0
            assert block not in self.naive.name
            self.naive.holders[block] = 1
        return tuple(blocks)

    @rule(blocks=held, number=st.integers(0, 5))
    def name(self, blocks: tuple[int, ...], number: int) -> None:
        for block in blocks:
            if block in self.naive.name or self.naive.holders[block] == 0:
                continue
            is_new = self.pool.name(BlockId(block), ContentKey(bytes([number]) * 32), SequenceHash(number % 3))
            assert is_new == (number not in self.naive.name.values())
            if is_new:
                self.naive.name[block] = number

    @rule(target=held, numbers=st.lists(st.integers(0, 5), max_size=3))
    def hit(self, numbers: list[int]) -> tuple[int, ...]:
        blocks = self.pool.match([ContentKey(bytes([n]) * 32) for n in numbers])
        by_name = {number: block for block, number in self.naive.name.items()}
        expected: list[int] = []
        for number in numbers:
            if number not in by_name:
                break
            expected.append(by_name[number])
        assert blocks == expected
        self.pool.retain(blocks)
        for block in blocks:
            self.naive.holders[block] += 1
            if block in self.naive.idle_order:
                self.naive.idle_order.remove(block)
        return tuple(blocks)

    @rule(blocks=consumes(held))
    def release(self, blocks: tuple[int, ...]) -> None:
        self.pool.release([BlockId(b) for b in blocks])
        for block in reversed(blocks):
            self.naive.drop(block)

    @rule(blocks=held)
    def disown(self, blocks: tuple[int, ...]) -> None:
        sole = {block for block in blocks if self.naive.holders[block] == 1}
        assert set(self.pool.disown([BlockId(b) for b in blocks])) == sole
        for block in sole:
            self.naive.name.pop(block, None)

    @invariant()
    def agrees(self) -> None:
        self.pool.check_invariants()
        assert self.pool.available_count == self.naive.available()
        assert self.pool.idle_count == len(self.naive.idle_order)
        for event in self.pool.journal.take():
            hashes = set(event.sequence_hashes)  # type: ignore[union-attr]
            if isinstance(event, BlocksStored):
                assert not hashes & self.listener
                self.listener |= hashes
            else:
                assert hashes <= self.listener
                self.listener -= hashes
        assert self.listener == {number % 3 for number in self.naive.name.values()} == self.pool.journal.held()


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
