"""What a worker has told the world that it holds, tier by tier: kept so that digests cost nothing and snapshots little.

    segments   | 0: gone | 1: h h - h | 2: h h h h | 3: h h        in the order in which they were told, 4096 to a segment
    places     h ─► number of its segment and its place there

A segment of which little is left is told again at the end, so that memory follows what is held. A snapshot is read segment by segment,
in pages, while blocks come and go: none that is there all the time is missed, because one that moves moves behind the reader.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator
from itertools import compress

from polyphase.core.digest import add_sums, digest_sum, subtract_sums
from polyphase.wire.events import AllCleared, BlocksRemoved, BlocksStored, Digests, KvEvent, Tier, TierDigest

SEGMENT_BLOCKS = 4096
PAGE_SEGMENTS = 8


class _Segment:
    __slots__ = ("hashes", "is_held", "live_count")

    def __init__(self) -> None:
        self.hashes: array[int] = array("Q")
        self.is_held = bytearray()  # one for each hash
        self.live_count = 0

    def live(self) -> array[int]:
        if self.live_count == len(self.hashes):
            return self.hashes
        return array("Q", list(compress(self.hashes, self.is_held)))  # from a list: five times as fast as from an iterator


class _TierLedger:
    """The blocks of one tier."""

    def __init__(self, segment_blocks: int) -> None:
        self.hash_sum = 0
        self._segment_blocks = segment_blocks
        self._places: dict[int, int] = {}  # hash ─► segment number * segment_blocks + place
        self._segments: dict[int, _Segment] = {}  # in the order of their numbers
        self._last = -1  # number of the segment that is being filled

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def store(self, hashes: list[int]) -> list[int]:
        """Returns those that were not held."""
        places = self._places
        fresh = [one for one in dict.fromkeys(hashes) if one not in places]
        self._append(fresh)
        self.hash_sum = add_sums(self.hash_sum, digest_sum(fresh))
        return fresh

    def remove(self, hashes: list[int]) -> list[int]:
        """Returns those that were held."""
        gone = []
        for one in hashes:
            place = self._places.pop(one, None)
            if place is None:
                continue
            gone.append(one)
            number, offset = divmod(place, self._segment_blocks)
            segment = self._segments[number]
            segment.is_held[offset] = 0
            segment.live_count -= 1
            if number != self._last:
                self._move_if_sparse(number)
        self.hash_sum = subtract_sums(self.hash_sum, digest_sum(gone))
        return gone

    def _append(self, hashes: Iterable[int]) -> None:
        segment = self._segments.get(self._last)
        for one in hashes:
            if segment is None or len(segment.hashes) == self._segment_blocks:
                full, self._last = self._last, self._last + 1
                self._segments[self._last] = _Segment()
                if segment is not None:
                    self._move_if_sparse(full)
                segment = self._segments[self._last]
            segment.hashes.append(one)
            self._places[one] = self._last * self._segment_blocks + len(segment.hashes) - 1
            segment.is_held.append(1)
            segment.live_count += 1

    def _move_if_sparse(self, number: int) -> None:
        segment = self._segments[number]
        if segment.live_count <= self._segment_blocks // 4:
            del self._segments[number]
            self._append(segment.live())

    def read(self, start: int, count: int) -> tuple[bytes, int | None]:
        """Blocks of up to `count` segments from number `start` on, and the number to read on from; None at the end."""
        data = array("Q")
        for number in sorted(number for number in self._segments if number >= start):
            if count == 0:
                return _packed(data), number
            data += self._segments[number].live()
            count -= 1
        return _packed(data), None


class Ledger:
    """Changed by the events that are told, in their order. Memory: about 0.15 kB per block."""

    def __init__(self, segment_blocks: int = SEGMENT_BLOCKS, page_segments: int = PAGE_SEGMENTS) -> None:
        self._segment_blocks = segment_blocks
        self._page_segments = page_segments
        self._tiers = self._empty()

    def _empty(self) -> dict[Tier, _TierLedger]:
        return {tier: _TierLedger(self._segment_blocks) for tier in Tier}

    def apply(self, events: Iterable[KvEvent]) -> list[KvEvent]:
        """Returns what of these events changes something: a block is told once when it comes and once when it goes."""
        effective: list[KvEvent] = []
        for event in events:
            match event:
                case BlocksStored():
                    fresh = self._tiers[event.tier].store(event.sequence_hashes)
                    if fresh:
                        effective.append(event if len(fresh) == len(event.sequence_hashes) else BlocksStored(fresh, event.tier))
                case BlocksRemoved():
                    gone = self._tiers[event.tier].remove(event.sequence_hashes)
                    if gone:
                        effective.append(event if len(gone) == len(event.sequence_hashes) else BlocksRemoved(gone, event.tier))
                case AllCleared():
                    self._tiers = self._empty()
                    effective.append(event)
        return effective

    def digests(self) -> Digests:
        return {tier: TierDigest(len(held), held.hash_sum) for tier, held in self._tiers.items() if len(held)}

    def held(self, tier: Tier = Tier.DEVICE) -> set[int]:
        """A copy, for people and tests."""
        return set(self._tiers[tier])

    def page(self, cursor: str | None) -> tuple[dict[Tier, bytes], str | None]:
        """A part of what is held, and where the next one begins (None: nowhere).

        Raises: ValueError for a cursor that no page named.
        """
        tiers = list(Tier)
        at, start = (0, 0) if cursor is None else _place_of(cursor)
        room = self._page_segments
        blocks: dict[Tier, bytes] = {}
        for tier in tiers[at:]:
            data, following = self._tiers[tier].read(start, room)
            if data:
                blocks[tier] = data
            if following is not None:
                return blocks, f"{tiers.index(tier)}:{following}"
            room -= len(data) // (8 * self._segment_blocks)
            start = 0
        return blocks, None


def _place_of(cursor: str) -> tuple[int, int]:
    tier, _, segment = cursor.partition(":")
    if not (tier.isdecimal() and segment.isdecimal() and int(tier) < len(Tier)):
        raise ValueError(f"there is no snapshot page {cursor[:40]!r}; a page is named by the one before it")
    return int(tier), int(segment)


def _packed(hashes: array[int]) -> bytes:
    if sys.byteorder == "big":
        hashes.byteswap()
    return hashes.tobytes()
