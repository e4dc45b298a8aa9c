"""Which worker holds which prefixes, by the plainest means that work: the truth that faster indexes are tested against.

    hash of block 0 ─► {decode-0, decode-1}
    hash of block 1 ─► {decode-0}            match([0, 1]) = {decode-0: 2, decode-1: 1}

A block counts only if all blocks before it are there too: a worker that evicted block 0 and still holds block 1 can reuse nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from polyphase.core.ids import SequenceHash, WorkerId
from polyphase.wire.events import Tier

DEFAULT_CAPACITY = 1_000_000
FASTEST_FIRST = tuple(Tier)


class NaiveOverlaps:
    """Depths by tier, each a dict."""

    def __init__(self, by_tier: dict[Tier, dict[WorkerId, int]]) -> None:
        self._by_tier = by_tier

    def depth(self, worker_id: WorkerId, tier: Tier = Tier.DEVICE) -> int:
        return self._by_tier[tier].get(worker_id, 0)

    def depths(self, worker_ids: Sequence[WorkerId], tier: Tier = Tier.DEVICE) -> list[int]:
        found = self._by_tier[tier]
        return [found.get(worker_id, 0) for worker_id in worker_ids] if found else [0] * len(worker_ids)

    def tokens_beyond(
        self, worker_ids: Sequence[WorkerId], block_size: int, token_count: int, at_least: int = 0, tier: Tier = Tier.DEVICE
    ) -> list[int]:
        return [max(token_count - depth * block_size, at_least) for depth in self.depths(worker_ids, tier)]

    def as_dict(self, tier: Tier = Tier.DEVICE) -> dict[WorkerId, int]:
        return dict(self._by_tier[tier])


class NaivePrefixIndex:
    """Sets in both directions. Memory: about 0.3 kB per block and worker. Beyond `capacity` blocks the oldest are forgotten."""

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        if capacity < 1:
            raise ValueError("the capacity is 0 blocks; an index holds at least one")
        self.capacity = capacity
        self.forgotten = 0
        self._holders: dict[SequenceHash, set[tuple[WorkerId, Tier]]] = {}  # oldest first
        self._held: defaultdict[tuple[WorkerId, Tier], set[SequenceHash]] = defaultdict(set)

    @property
    def size(self) -> int:
        return len(self._holders)

    def store(self, worker_id: WorkerId, hashes: Iterable[SequenceHash], tier: Tier = Tier.DEVICE) -> None:
        holder = (worker_id, tier)
        for sequence_hash in hashes:
            self._holders.setdefault(sequence_hash, set()).add(holder)
            self._held[holder].add(sequence_hash)
            if len(self._holders) > self.capacity:
                self._forget_oldest()

    def remove(self, worker_id: WorkerId, hashes: Iterable[SequenceHash], tier: Tier = Tier.DEVICE) -> None:
        held = self._held.get((worker_id, tier), set())
        for sequence_hash in hashes:
            if sequence_hash in held:
                held.remove(sequence_hash)
                self._forget_holder(sequence_hash, (worker_id, tier))

    def clear(self, worker_id: WorkerId) -> None:
        for tier in Tier:
            for sequence_hash in self._held.pop((worker_id, tier), set()):
                self._forget_holder(sequence_hash, (worker_id, tier))

    def match(self, hashes: Sequence[SequenceHash]) -> NaiveOverlaps:
        """Cost: O(depth of the deepest match x workers that hold it), for each tier."""
        return NaiveOverlaps({tier: self._match(hashes, set(FASTEST_FIRST[: place + 1])) for place, tier in enumerate(FASTEST_FIRST)})

    def block_count(self, worker_id: WorkerId, tier: Tier = Tier.DEVICE) -> int:
        return len(self._held.get((worker_id, tier), ()))

    def _match(self, hashes: Sequence[SequenceHash], tiers: set[Tier]) -> dict[WorkerId, int]:
        depths: dict[WorkerId, int] = {}
        leading: set[WorkerId] | None = None
        for position, sequence_hash in enumerate(hashes, start=1):
            holders = {worker_id for worker_id, tier in self._holders.get(sequence_hash, ()) if tier in tiers}
            leading = holders if leading is None else leading & holders
            if not leading:
                break
            for worker_id in leading:
                depths[worker_id] = position
        return depths

    def _forget_holder(self, sequence_hash: SequenceHash, holder: tuple[WorkerId, Tier]) -> None:
        holders = self._holders[sequence_hash]
        holders.remove(holder)
        if not holders:
            del self._holders[sequence_hash]

    def _forget_oldest(self) -> None:
        oldest = next(iter(self._holders))
        for holder in self._holders.pop(oldest):
            self._held[holder].remove(oldest)
        self.forgotten += 1
