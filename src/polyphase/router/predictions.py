"""Prefixes that are on their way: of requests that were routed and whose prompts are not computed yet.

    held at routing │ new: on its way
    h0 h1 .. h63    │ h64 h65 ..        ─► first token, or the end ─► forgotten: the worker's events tell what is there

Until a prompt is computed no event tells of it, and requests with the same prefix that come in the meantime, a burst of them most of all,
would each be computed somewhere else. Only the hashes' lists are kept, as they are; an equal hash at one place means equal prefixes up to
there, so what a request shares with the new part of another shows at one place: where that part begins. All under way are found with one
look-up for each place at which any of them begins.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polyphase.core.ids import RequestId, SequenceHash, WorkerId
from polyphase.router.types import Overlaps

NOTHING: Mapping[WorkerId, int] = {}


@dataclass(slots=True)
class _Expected:
    worker_id: WorkerId
    hashes: Sequence[SequenceHash]
    begins: int  # blocks before it were held when it was routed


class ExpectedPrefixes:
    """Unknown requests are ignored. Memory: one entry per request that waits for its first token."""

    def __init__(self) -> None:
        self._by_request: dict[RequestId, _Expected] = {}
        self._by_place: dict[int, dict[SequenceHash, dict[RequestId, _Expected]]] = {}  # where the new part begins, and its first hash

    def __len__(self) -> int:
        return len(self._by_request)

    def expect(self, request_id: RequestId, worker_id: WorkerId, hashes: Sequence[SequenceHash], held_block_count: int = 0) -> None:
        """The worker is going to hold all of `hashes`, of which it holds the leading `held_block_count` already.

        Replaces what was expected of this request before.
        """
        self.settle(request_id)
        if held_block_count < len(hashes):
            expected = _Expected(worker_id, hashes, held_block_count)
            self._by_request[request_id] = expected
            alike = self._by_place.setdefault(held_block_count, {}).setdefault(hashes[held_block_count], {})
            alike[request_id] = expected

    def settle(self, request_id: RequestId) -> None:
        """The prompt is computed, or never will be."""
        expected = self._by_request.pop(request_id, None)
        if expected is not None:
            first = expected.hashes[expected.begins]
            there = self._by_place[expected.begins]
            del there[first][request_id]
            if not there[first]:
                del there[first]
                if not there:
                    del self._by_place[expected.begins]

    def drop_worker(self, worker_id: WorkerId) -> None:
        for request_id in [request_id for request_id, one in self._by_request.items() if one.worker_id == worker_id]:
            self.settle(request_id)

    def beyond(self, hashes: Sequence[SequenceHash], overlaps: Overlaps) -> Mapping[WorkerId, int]:
        """Leading blocks of `hashes` that workers are going to hold, where these are more than they hold (`overlaps`).

        Cost: O(places where something under way begins + requests under way that share new blocks with this one).
        """
        deeper: dict[WorkerId, int] = {}
        for begins, there in self._by_place.items():
            alike = there.get(hashes[begins]) if begins < len(hashes) else None
            if alike is not None:
                for one in alike.values():
                    depth = deeper.get(one.worker_id) or overlaps.depth(one.worker_id)
                    reach = min(len(hashes), len(one.hashes))
                    if depth < reach and one.hashes[depth] == hashes[depth]:
                        deeper[one.worker_id] = _common_depth(one.hashes, hashes, depth, reach)
        return deeper or NOTHING


def _common_depth(some: Sequence[SequenceHash], others: Sequence[SequenceHash], depth: int, reach: int) -> int:
    """Leading equal blocks, of which there are at least `depth` and at most `reach`."""
    return depth + bisect_left(range(depth, reach), True, key=lambda place: some[place] != others[place])
