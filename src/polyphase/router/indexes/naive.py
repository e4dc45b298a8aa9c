"""Which worker holds which prefixes, by the plainest means that work: the truth that faster indexes are tested against.

    hash of block 0 ─► {decode-0, decode-1}
    hash of block 1 ─► {decode-0}            match([0, 1]) = {decode-0: 2, decode-1: 1}

A block counts only if all blocks before it are there too: a worker that evicted block 0 and still holds block 1 can reuse nothing.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence

from polyphase.core.digest import add_sums, mixed, subtract_sums
from polyphase.core.ids import SequenceHash, WorkerId
from polyphase.router.columns import Column
from polyphase.wire.events import Tier

DEFAULT_CAPACITY = 1_000_000
BYTES_PER_COPY = 300  # of a block at a worker; measured
FASTEST_FIRST = tuple(Tier)
NOBODY: set[WorkerId] = set()


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
    ) -> Column:
        return array("d", (max(token_count - depth * block_size, at_least) for depth in self.depths(worker_ids, tier)))

    @property
    def level_count(self) -> int:
        return len({id(depths) for depths in self._by_tier.values()})

    def as_dict(self, tier: Tier = Tier.DEVICE) -> dict[WorkerId, int]:
        return dict(self._by_tier[tier])


class NaivePrefixIndex:
    """Sets in both directions. Memory: about 0.3 kB per block and worker. Beyond `capacity` blocks the oldest are forgotten."""

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        if capacity < 1:
            raise ValueError("the capacity is 0 blocks; an index holds at least one")
        self.capacity = capacity
        self.forgotten = 0
        self._holders: dict[Tier, dict[SequenceHash, set[WorkerId]]] = {tier: {} for tier in Tier}
        self._held: defaultdict[tuple[WorkerId, Tier], set[SequenceHash]] = defaultdict(set)
        self._copies: dict[SequenceHash, int] = {}  # over all workers and tiers; oldest first
        self._told: dict[tuple[WorkerId, Tier], tuple[int, int]] = {}  # count and sum of what is held, or was forgotten and not withdrawn

    @property
    def size(self) -> int:
        return len(self._copies)

    @property
    def kind(self) -> str:
        return "naive"

    @property
    def heap_bytes(self) -> int:
        return BYTES_PER_COPY * sum(map(len, self._held.values()))

    def store(self, worker_id: WorkerId, hashes: Iterable[SequenceHash], tier: Tier = Tier.DEVICE) -> None:
        held, holders = self._held[worker_id, tier], self._holders[tier]
        for sequence_hash in hashes:
            if sequence_hash in held:
                continue
            held.add(sequence_hash)
            self._tell(sequence_hash, worker_id, tier)
            holders.setdefault(sequence_hash, set()).add(worker_id)
            self._copies[sequence_hash] = self._copies.get(sequence_hash, 0) + 1
            if len(self._copies) > self.capacity:
                self._forget_oldest()

    def remove(self, worker_id: WorkerId, hashes: Iterable[SequenceHash], tier: Tier = Tier.DEVICE) -> None:
        for sequence_hash in hashes:
            if sequence_hash in self._held.get((worker_id, tier), ()):
                self._drop(sequence_hash, worker_id, tier)
                self._withdraw(sequence_hash, worker_id, tier)
            elif self.digest(worker_id, tier)[0] > self.block_count(worker_id, tier):  # so it may have been forgotten
                self._withdraw(sequence_hash, worker_id, tier)

    def clear(self, worker_id: WorkerId) -> None:
        for tier in Tier:
            for sequence_hash in list(self._held.get((worker_id, tier), ())):
                self._drop(sequence_hash, worker_id, tier)
            self._held.pop((worker_id, tier), None)
            self._told.pop((worker_id, tier), None)

    def match(self, hashes: Sequence[SequenceHash]) -> NaiveOverlaps:
        """Cost: O(depth of the deepest match x workers that hold it), once more for each lower tier that is in use."""
        found: dict[Tier, dict[WorkerId, int]] = {}
        used: list[dict[SequenceHash, set[WorkerId]]] = []
        depths: dict[WorkerId, int] = {}
        for tier in FASTEST_FIRST:
            if self._holders[tier]:
                used.append(self._holders[tier])
                depths = _leading(hashes, used)
            found[tier] = depths
        return NaiveOverlaps(found)

    def block_count(self, worker_id: WorkerId, tier: Tier = Tier.DEVICE) -> int:
        return len(self._held.get((worker_id, tier), ()))

    def digest(self, worker_id: WorkerId, tier: Tier = Tier.DEVICE) -> tuple[int, int]:
        return self._told.get((worker_id, tier), (0, 0))

    def _drop(self, sequence_hash: SequenceHash, worker_id: WorkerId, tier: Tier) -> None:
        self._held[worker_id, tier].remove(sequence_hash)
        holders = self._holders[tier][sequence_hash]
        holders.remove(worker_id)
        if not holders:
            del self._holders[tier][sequence_hash]
        self._copies[sequence_hash] -= 1
        if not self._copies[sequence_hash]:
            del self._copies[sequence_hash]

    def _forget_oldest(self) -> None:
        oldest = next(iter(self._copies))
        for tier, holders in self._holders.items():
            for worker_id in list(holders.get(oldest, ())):
                self._drop(oldest, worker_id, tier)
        self.forgotten += 1

    def _tell(self, sequence_hash: SequenceHash, worker_id: WorkerId, tier: Tier) -> None:
        count, total = self._told.get((worker_id, tier), (0, 0))
        self._told[worker_id, tier] = count + 1, add_sums(total, mixed(sequence_hash))

    def _withdraw(self, sequence_hash: SequenceHash, worker_id: WorkerId, tier: Tier) -> None:
        count, total = self._told[worker_id, tier]
        if count > 1:
            self._told[worker_id, tier] = count - 1, subtract_sums(total, mixed(sequence_hash))
        else:
            del self._told[worker_id, tier]


def _leading(hashes: Sequence[SequenceHash], tiers: Sequence[dict[SequenceHash, set[WorkerId]]]) -> dict[WorkerId, int]:
    """Leading blocks that each worker holds in any of these tiers."""
    depths: dict[WorkerId, int] = {}
    leading: set[WorkerId] | None = None
    depth = 0
    for sequence_hash in hashes:
        holders = tiers[0].get(sequence_hash, NOBODY)
        for lower in tiers[1:]:
            holders = holders | lower.get(sequence_hash, NOBODY)
        still = holders if leading is None else leading & holders
        if leading is not None and len(still) < len(leading):
            depths.update(dict.fromkeys(leading - still, depth))
        leading = set(still) if leading is None else still
        if not leading:
            return depths
        depth += 1
    depths.update(dict.fromkeys(leading or (), depth))
    return depths
