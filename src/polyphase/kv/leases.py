"""Blocks kept for a reader in another process, each for a limited time."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from polyphase.core.errors import KvError
from polyphase.core.ids import BlockId


@dataclass(frozen=True, slots=True)
class Lease:
    lease_id: str
    block_ids: tuple[BlockId, ...]
    expires_at_ns: int


class LeaseTable:
    """Holds no references itself: what `release` and `expire` return, the caller gives back to the pool."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}
        self._block_uses: Counter[BlockId] = Counter()
        self._by_expiry: list[tuple[int, str]] = []  # a heap; entries of released leases are skipped when they surface

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, lease_id: str) -> bool:
        return lease_id in self._leases

    @property
    def block_count(self) -> int:
        """Blocks under lease; one that is leased twice counts once."""
        return len(self._block_uses)

    def pinned(self) -> Iterable[BlockId]:
        """Blocks under lease, each once."""
        return self._block_uses.keys()

    @property
    def next_expiry_ns(self) -> int | None:
        self._drop_stale()
        return self._by_expiry[0][0] if self._by_expiry else None

    def acquire(self, lease_id: str, block_ids: list[BlockId], expires_at_ns: int) -> Lease:
        if lease_id in self._leases:
            raise KvError(f"lease {lease_id} exists already")
        lease = Lease(lease_id, tuple(block_ids), expires_at_ns)
        self._leases[lease_id] = lease
        self._block_uses.update(lease.block_ids)
        heapq.heappush(self._by_expiry, (expires_at_ns, lease_id))
        return lease

    def release(self, lease_id: str) -> Lease | None:
        """End a lease; None if there is none of that name (released before, or run out)."""
        lease = self._leases.pop(lease_id, None)
        if lease is not None:
            self._block_uses.subtract(lease.block_ids)
            for block_id in lease.block_ids:
                if self._block_uses[block_id] <= 0:
                    del self._block_uses[block_id]
        return lease

    def expire(self, now_ns: int) -> list[Lease]:
        """End and return the leases whose time is up, the oldest first."""
        ended: list[Lease] = []
        while (due := self.next_expiry_ns) is not None and due <= now_ns:
            _, lease_id = heapq.heappop(self._by_expiry)
            lease = self.release(lease_id)
            if lease is not None:
                ended.append(lease)
        return ended

    def _drop_stale(self) -> None:
        while self._by_expiry:
            expires_at_ns, lease_id = self._by_expiry[0]
            lease = self._leases.get(lease_id)
            if lease is not None and lease.expires_at_ns == expires_at_ns:
                return
            heapq.heappop(self._by_expiry)
