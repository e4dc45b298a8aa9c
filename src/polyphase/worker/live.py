"""Which peer waits for which request, so that a step's outputs find their way and nobody's requests outlive their peer."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from polyphase.runtime import PeerId
from polyphase.wire.cards import Role
from polyphase.wire.kv import Offer
from polyphase.wire.requests import SequenceOutput
from polyphase.worker.roles import takes


@dataclass(slots=True)
class LiveRequest:
    """Accepted, and not answered for good."""

    request_id: str
    peer: PeerId
    token_count: int = 0  # sent so far
    opening: asyncio.Task[None] | None = None  # the offer's pool is being opened; the engine does not know the request yet
    offer: Offer | None = None  # as long as it is being opened
    wants_hand_over: bool = False  # a prefill leg
    deadline_s: float | None = None  # of the monotonic clock


class LiveRequests:
    """By request and by peer."""

    def __init__(self) -> None:
        self._by_id: dict[str, LiveRequest] = {}
        self._by_peer: dict[PeerId, set[str]] = {}
        self._deadlines: list[tuple[float, str]] = []  # a heap, with some of requests that have ended

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, request_id: str, peer: PeerId, *, wants_hand_over: bool = False) -> LiveRequest:
        assert request_id not in self._by_id, request_id
        request = self._by_id[request_id] = LiveRequest(request_id, peer, wants_hand_over=wants_hand_over)
        self._by_peer.setdefault(peer, set()).add(request_id)
        return request

    def get(self, request_id: str) -> LiveRequest | None:
        return self._by_id.get(request_id)

    def remove(self, request_id: str) -> None:
        """Unknown ids are ignored."""
        request = self._by_id.pop(request_id, None)
        if request is not None:
            of_peer = self._by_peer[request.peer]
            of_peer.discard(request_id)
            if not of_peer:
                del self._by_peer[request.peer]

    def end_by(self, request: LiveRequest, deadline_s: float) -> None:
        """Nobody awaits it after this time of the monotonic clock."""
        request.deadline_s = deadline_s
        heapq.heappush(self._deadlines, (deadline_s, request.request_id))
        if len(self._deadlines) > 2 * len(self._by_id) + 64:
            self._deadlines = [entry for entry in self._deadlines if self._is_open(*entry)]
            heapq.heapify(self._deadlines)

    def overdue(self, now_s: float) -> list[LiveRequest]:
        """Those whose time is over, once each. Cost: O(1) if there are none."""
        found = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            deadline_s, request_id = heapq.heappop(self._deadlines)
            if self._is_open(deadline_s, request_id):
                found.append(self._by_id[request_id])
        return found

    def _is_open(self, deadline_s: float, request_id: str) -> bool:
        request = self._by_id.get(request_id)
        return request is not None and request.deadline_s == deadline_s

    def of_peer(self, peer: PeerId) -> list[LiveRequest]:
        return [self._by_id[request_id] for request_id in self._by_peer.get(peer, ())]

    def count_misplaced(self, role: Role) -> int:
        """Those that are not what a worker of this role is for."""
        return sum(not takes(role, wants_hand_over=request.wants_hand_over) for request in self._by_id.values())

    def peers(self) -> list[PeerId]:
        """Those who wait for something."""
        return list(self._by_peer)

    def group(self, outputs: Iterable[SequenceOutput]) -> dict[PeerId, list[SequenceOutput]]:
        """Outputs by the peer that waits for them; those that nobody waits for any more are left out."""
        groups: dict[PeerId, list[SequenceOutput]] = {}
        for output in outputs:
            request = self._by_id.get(output.request_id)
            if request is not None:
                request.token_count += len(output.token_ids)
                groups.setdefault(request.peer, []).append(output)
        return groups
