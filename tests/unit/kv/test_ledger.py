"""What was told is remembered exactly, and read in pages while it changes."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from polyphase.core.digest import digest_sum
from polyphase.kv import Ledger
from polyphase.wire.events import AllCleared, BlocksRemoved, BlocksStored, KvEvent, Tier, TierDigest

TIERS = st.sampled_from(list(Tier))
HASHES = st.lists(st.integers(0, 30), min_size=1, max_size=8)


def unpacked(blocks: dict[Tier, bytes]) -> dict[Tier, list[int]]:
    return {tier: array("Q", data).tolist() for tier, data in blocks.items()}


def read_all(ledger: Ledger) -> dict[Tier, list[int]]:
    found: dict[Tier, list[int]] = {}
    cursor = None
    while True:
        blocks, cursor = ledger.page(cursor)
        for tier, hashes in unpacked(blocks).items():
            found.setdefault(tier, []).extend(hashes)
        if cursor is None:
            return found


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(segment_blocks=4, page_segments=2)
        self.held: dict[Tier, set[int]] = {tier: set() for tier in Tier}
        self.cursor: str | None = None
        self.is_reading = False
        self.always: dict[Tier, set[int]] = {}  # held ever since the reading began
        self.read: dict[Tier, set[int]] = {}
        self.ever: dict[Tier, set[int]] = {}  # held at some time since

    def told(self, event: KvEvent) -> list[KvEvent]:
        effective = self.ledger.apply([event])
        for tier in Tier:
            if self.is_reading:
                self.always[tier] &= self.held[tier]
                self.ever[tier] |= self.held[tier]
        return effective

    @rule(hashes=HASHES, tier=TIERS)
    def store(self, hashes: list[int], tier: Tier) -> None:
        fresh = [one for one in dict.fromkeys(hashes) if one not in self.held[tier]]
        self.held[tier].update(hashes)
        assert self.told(BlocksStored(hashes, tier)) == ([BlocksStored(fresh, tier)] if fresh else [])

    @rule(hashes=HASHES, tier=TIERS)
    def remove(self, hashes: list[int], tier: Tier) -> None:
        gone = [one for one in dict.fromkeys(hashes) if one in self.held[tier]]
        self.held[tier].difference_update(hashes)
        assert self.told(BlocksRemoved(hashes, tier)) == ([BlocksRemoved(gone, tier)] if gone else [])

    @precondition(lambda self: sum(map(len, self.held.values())) > 15)
    @rule()
    def clear(self) -> None:
        for blocks in self.held.values():
            blocks.clear()
        assert self.told(AllCleared()) == [AllCleared()]

    @rule()
    def read_a_page(self) -> None:
        if not self.is_reading:
            self.always, self.ever = ({tier: set(blocks) for tier, blocks in self.held.items()} for _ in range(2))
            self.read = {tier: set() for tier in Tier}
        blocks, self.cursor = self.ledger.page(self.cursor)
        for tier, hashes in unpacked(blocks).items():
            self.read[tier].update(hashes)
        self.is_reading = self.cursor is not None
        if not self.is_reading:
            for tier in Tier:
                assert self.always[tier] <= self.read[tier] <= self.ever[tier]

    @invariant()
    def it_holds_what_was_told(self) -> None:
        assert {tier: self.ledger.held(tier) for tier in Tier} == self.held
        assert self.ledger.digests() == {tier: TierDigest(len(held), digest_sum(held)) for tier, held in self.held.items() if held}
        found = read_all(self.ledger)
        assert {tier: sorted(hashes) for tier, hashes in found.items()} == {tier: sorted(held) for tier, held in self.held.items() if held}
        segments = sum(len(tier._segments) for tier in self.ledger._tiers.values())
        assert segments <= sum(map(len, self.held.values())) + len(Tier), "memory follows what is held"


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_snapshot_keeps_the_order_in_which_blocks_were_told():
    """So that an index finds the blocks of a prompt side by side."""
    ledger = Ledger()
    hashes = list(range(20_000))
    random.Random(1).shuffle(hashes)
    for start in range(0, len(hashes), 100):
        ledger.apply([BlocksStored(hashes[start : start + 100])])
    assert read_all(ledger) == {Tier.DEVICE: hashes}
    ledger.apply([BlocksRemoved(hashes[5_000:15_000:2])])
    assert read_all(ledger)[Tier.DEVICE] == [one for place, one in enumerate(hashes) if not 5_000 <= place < 15_000 or place % 2]


def test_pages_are_bounded():
    ledger = Ledger()
    ledger.apply([BlocksStored(list(range(200_000)))])
    cursor, pages = None, 0
    while True:
        blocks, cursor = ledger.page(cursor)
        pages += 1
        assert sum(map(len, blocks.values())) <= 8 * 8 * 4096
        if cursor is None:
            break
    assert pages == 7


@pytest.mark.parametrize("cursor", ["", "device", "9:0", "0", "0:-1", "x:1", ":"])
def test_a_page_that_nobody_named_is_refused(cursor: str):
    with pytest.raises(ValueError, match="named by the one before"):
        Ledger().page(cursor)
