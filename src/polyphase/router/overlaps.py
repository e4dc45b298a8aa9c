"""Overlaps of one prompt with workers whose blocks differ in size: a match for each size, seen as one.

A hash stands for tokens in blocks of one size, so a worker is found by the hashes of its own size only, and what the matches say of it
can be put together without asking which size it has.
"""

from __future__ import annotations

from collections.abc import Sequence

from polyphase.core.ids import WorkerId
from polyphase.router.columns import Column
from polyphase.router.types import Overlaps
from polyphase.wire.events import Tier


class OverlapsBySize:
    """Implements `Overlaps`; `by_size` has the match for each block size. Depths are in blocks of the worker's own size."""

    __slots__ = ("_by_size",)

    def __init__(self, by_size: Sequence[tuple[int, Overlaps]]) -> None:
        self._by_size = by_size

    def depth(self, worker_id: WorkerId, tier: Tier = Tier.DEVICE) -> int:
        return max(overlaps.depth(worker_id, tier) for _, overlaps in self._by_size)

    def depths(self, worker_ids: Sequence[WorkerId], tier: Tier = Tier.DEVICE) -> list[int]:
        return list(map(max, *(overlaps.depths(worker_ids, tier) for _, overlaps in self._by_size)))

    def tokens_beyond(
        self, worker_ids: Sequence[WorkerId], block_size: int, token_count: int, at_least: int = 0, tier: Tier = Tier.DEVICE
    ) -> Column:
        """`block_size` is of no account: each match knows its own."""
        (size, first), *others = self._by_size
        column = first.tokens_beyond(worker_ids, size, token_count, at_least, tier)
        for size, overlaps in others:
            for row, tokens in enumerate(overlaps.tokens_beyond(worker_ids, size, token_count, at_least, tier)):
                column[row] = min(column[row], tokens)
        return column

    @property
    def level_count(self) -> int:
        return max(overlaps.level_count for _, overlaps in self._by_size)

    def as_dict(self, tier: Tier = Tier.DEVICE) -> dict[WorkerId, int]:
        return {worker_id: depth for _, overlaps in self._by_size for worker_id, depth in overlaps.as_dict(tier).items()}
