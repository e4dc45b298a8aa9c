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

    def deepen(self, hashes: Sequence[SequenceHash], depths: Mapping[WorkerId, int]) -> Mapping[WorkerId, int]:
        """`depths` are the blocks of `hashes` that each worker holds; returned with those that it is going to hold.

        Cost: O(requests under way that begin with the same block).
        """
        alike = self._by_first.get(hashes[0]) if hashes else None
        if not alike:
            return depths
        deeper = dict(depths)
        for one in alike.values():
            depth = deeper.get(one.worker_id, 0)
            reach = min(len(hashes), len(one.hashes))
            if depth < reach and one.hashes[depth] == hashes[depth]:
                deeper[one.worker_id] = depth + bisect_left(
                    range(depth, reach), True, key=lambda place, other=one.hashes: other[place] != hashes[place]  # type: ignore[misc]
                )
        return deeper
