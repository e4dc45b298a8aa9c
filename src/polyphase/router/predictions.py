"""Prefixes that are on their way: of requests that were routed and whose prompts are not computed yet.

    route ─► expected at its worker ─► first token, or the end ─► forgotten: the worker's events tell what is there

Until a prompt is computed no event tells of it, and requests with the same prefix that come in the meantime, a burst of them most of all,
would each be computed somewhere else. Only the hashes' lists are kept, as they are; an equal hash at one place means equal prefixes up to
there, so a request is compared with those under way at one place each, and further only where that one is equal.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polyphase.core.ids import RequestId, SequenceHash, WorkerId
from polyphase.router.types import Overlaps
from polyphase.wire.events import Tier


@dataclass(frozen=True, slots=True)
class _Expected:
    worker_id: WorkerId
    hashes: Sequence[SequenceHash]


class ExpectedPrefixes:
    """Unknown requests are ignored. Memory: one entry per request that waits for its first token."""

    def __init__(self) -> None:
        self._by_request: dict[RequestId, _Expected] = {}
        self._by_first: dict[SequenceHash, dict[RequestId, _Expected]] = {}

    def __len__(self) -> int:
        return len(self._by_request)

    def expect(self, request_id: RequestId, worker_id: WorkerId, hashes: Sequence[SequenceHash]) -> None:
        """Replaces what was expected of this request before."""
        self.settle(request_id)
        if hashes:
            expected = _Expected(worker_id, hashes)
            self._by_request[request_id] = expected
            self._by_first.setdefault(hashes[0], {})[request_id] = expected

    def settle(self, request_id: RequestId) -> None:
        """The prompt is computed, or never will be."""
        expected = self._by_request.pop(request_id, None)
        if expected is not None:
            alike = self._by_first[expected.hashes[0]]
            del alike[request_id]
            if not alike:
                del self._by_first[expected.hashes[0]]

    def drop_worker(self, worker_id: WorkerId) -> None:
        for request_id in [request_id for request_id, one in self._by_request.items() if one.worker_id == worker_id]:
            self.settle(request_id)

    def deepen(self, hashes: Sequence[SequenceHash], overlaps: Overlaps) -> Overlaps:
        """`overlaps` are the blocks of `hashes` that each worker holds; returned with those that it is going to hold.

        Cost: O(requests under way that begin with the same block).
        """
        alike = self._by_first.get(hashes[0]) if hashes else None
        if not alike:
            return overlaps
        deeper: dict[WorkerId, int] = {}
        for one in alike.values():
            depth = deeper.get(one.worker_id) or overlaps.depth(one.worker_id)
            reach = min(len(hashes), len(one.hashes))
            if depth < reach and one.hashes[depth] == hashes[depth]:
                deeper[one.worker_id] = depth + bisect_left(
                    range(depth, reach),
                    True,
                    key=lambda place, other=one.hashes: other[place] != hashes[place],  # type: ignore[misc]
                )
        return DeepenedOverlaps(overlaps, deeper) if deeper else overlaps


class DeepenedOverlaps:
    """What workers hold, and for some of them what they are going to hold: that comes to lie in the fastest tier, so it counts in all."""

    __slots__ = ("_deeper", "_held")

    def __init__(self, held: Overlaps, deeper: Mapping[WorkerId, int]) -> None:
        self._held = held
        self._deeper = deeper

    def depth(self, worker_id: WorkerId, tier: Tier = Tier.DEVICE) -> int:
        return max(self._held.depth(worker_id, tier), self._deeper.get(worker_id, 0))

    def depths(self, worker_ids: Sequence[WorkerId], tier: Tier = Tier.DEVICE) -> list[int]:
        deeper = self._deeper
        return [max(depth, deeper.get(one, 0)) for one, depth in zip(worker_ids, self._held.depths(worker_ids, tier), strict=True)]

    def tokens_beyond(
        self, worker_ids: Sequence[WorkerId], block_size: int, token_count: int, at_least: int = 0, tier: Tier = Tier.DEVICE
    ) -> list[int]:
        return [max(token_count - depth * block_size, at_least) for depth in self.depths(worker_ids, tier)]

    def as_dict(self, tier: Tier = Tier.DEVICE) -> dict[WorkerId, int]:
        found = self._held.as_dict(tier)
        return found | {worker_id: max(depth, found.get(worker_id, 0)) for worker_id, depth in self._deeper.items()}
