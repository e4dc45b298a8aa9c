"""What a server keeps of prompts that it has computed for others: which offers are open, and until when.

The server frees by itself what was fetched, and after its own lease what was not; here is only known that it is still there. So a worker
that drains waits for its readers, and a leg that is still computed when nobody wants it any more is ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from polyphase.core.clock import Clock, MonotonicClock
from polyphase.wire.kv import EngineOffer
from polyphase.wire.requests import Submit


def kind_of(engine: str, facts: Mapping[str, str]) -> str:
    """Equal at two servers where these facts are."""
    digest = xxhash.xxh3_64_hexdigest("\0".join(f"{name}={value}" for name, value in sorted(facts.items())).encode())
    return f"{engine}/{digest}"


LINGER_S = 0.5


@dataclass(frozen=True, slots=True)
class _Lease:
    offer: EngineOffer
    request_id: str
    leg: asyncio.Task[None] | None  # that computes the prompt, perhaps still


class OpenOffers:
    """Used on one event loop."""

    def __init__(self, kind: str, lease_s: float, block_size: int, clock: Clock | None = None) -> None:
        self._kind = kind
        self._lease_ns = int(lease_s * 1e9)
        self._block_size = block_size
        self._clock = clock or MonotonicClock()
        self._origin = ("", 0, "")  # worker id, epoch, endpoint
        self._leases: dict[str, _Lease] = {}  # oldest first
        self._count = 0

    def bind(self, worker_id: str, epoch: int, endpoint: str) -> None:
        self._origin = (worker_id, epoch, endpoint)

    def make(self, request: Submit, params: dict[str, Any], leg: asyncio.Task[None] | None) -> EngineOffer:
        worker_id, epoch, endpoint = self._origin
        self._count += 1
        offer = EngineOffer(
            worker_id=worker_id,
            epoch=epoch,
            endpoint=endpoint,
            lease_id=f"{request.request_id}#{self._count}",
            expires_at_ns=self._clock.now_ns() + self._lease_ns,
            kind=self._kind,
            params=params,
            token_count=len(request.token_ids),
        )
        self._leases[offer.lease_id] = _Lease(offer, request.request_id, leg)
        return offer

    def release(self, lease_id: str) -> None:
        """Its reader has it, in which case a leg that still runs is about to end by itself, or nobody wants it. Unknown ids are ignored."""
        lease = self._leases.pop(lease_id, None)
        if lease is not None and lease.leg is not None and not lease.leg.done():
            lease.leg.get_loop().call_later(LINGER_S, lease.leg.cancel)

    def release_request(self, request_id: str) -> None:
        """It is called off."""
        for lease_id in [lease_id for lease_id, lease in self._leases.items() if lease.request_id == request_id]:
            leg = self._leases.pop(lease_id).leg
            if leg is not None:
                leg.cancel()

    def computing_token_count(self) -> int:
        """Of prompts that are offered already and still computed."""
        return sum(lease.offer.token_count for lease in self._leases.values() if lease.leg is not None and not lease.leg.done())

    def block_count(self) -> int:
        """That the open ones keep at the server. Those whose time is over go."""
        now_ns = self._clock.now_ns()
        while self._leases and (first := next(iter(self._leases.values()))).offer.expires_at_ns <= now_ns:
            self.release(first.offer.lease_id)
        return sum(-(-lease.offer.token_count // self._block_size) for lease in self._leases.values())

    def clear(self) -> None:
        self._leases.clear()
