"""Leases that this agent gave on its blocks, and which peer holds them: freed when it acknowledges, dies, or lets them run out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from polyphase.core.ids import BlockId
from polyphase.kv.leases import LeaseTable

log = logging.getLogger(__name__)

OnEnd = Callable[[str, "LeaseEnd"], None]


@dataclass(frozen=True, slots=True)
class LeaseEnd:
    """Why a lease ended: "released", "expired", "peer lost" or "region released"."""

    reason: str


@dataclass(slots=True)
class _Terms:
    region_id: str
    on_end: OnEnd | None
    holders: int = 0  # peers that took it


class Lending:
    """Any thread may call; `on_end` is called once for each lease, outside the lock, by whichever thread ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tables: dict[str, LeaseTable] = {}  # by region
        self._terms: dict[str, _Terms] = {}

    def __len__(self) -> int:
        return len(self._terms)

    def __contains__(self, lease_id: str) -> bool:
        return lease_id in self._terms

    def lend(self, lease_id: str, region_id: str, block_ids: list[int], expires_at_ns: int, on_end: OnEnd | None) -> None:
        """Raises: KvError if there is a lease of this name."""
        with self._lock:
            table = self._tables.setdefault(region_id, LeaseTable())
            table.acquire(lease_id, [BlockId(block_id) for block_id in block_ids], expires_at_ns)
            self._terms[lease_id] = _Terms(region_id, on_end)

    def pinned(self, region_id: str) -> set[int]:
        """Blocks of the region that some lease keeps."""
        with self._lock:
            table = self._tables.get(region_id)
            return set(table.pinned()) if table is not None else set()

    def take(self, lease_id: str) -> bool:
        """A peer says that it reads. False: there is no such lease (any more)."""
        with self._lock:
            terms = self._terms.get(lease_id)
            if terms is None:
                return False
            terms.holders += 1
            return True

    def drop(self, lease_id: str) -> bool:
        """A peer that had taken the lease died. The lease ends with its last holder."""
        with self._lock:
            terms = self._terms.get(lease_id)
            if terms is None:
                return False
            terms.holders -= 1
            if terms.holders > 0:
                return False
        return self.end(lease_id, LeaseEnd("peer lost"))

    def end(self, lease_id: str, why: LeaseEnd) -> bool:
        """False: it had ended before."""
        with self._lock:
            terms = self._terms.pop(lease_id, None)
            if terms is None:
                return False
            self._tables[terms.region_id].release(lease_id)
        self._tell(lease_id, terms, why)
        return True

    def expire(self, now_ns: int) -> int:
        """End all whose time is up; returns how many."""
        ended: list[tuple[str, _Terms]] = []
        with self._lock:
            for table in self._tables.values():
                for lease in table.expire(now_ns):
                    ended.append((lease.lease_id, self._terms.pop(lease.lease_id)))
        for lease_id, terms in ended:
            self._tell(lease_id, terms, LeaseEnd("expired"))
        return len(ended)

    def end_region(self, region_id: str) -> None:
        with self._lock:
            lease_ids = [lease_id for lease_id, terms in self._terms.items() if terms.region_id == region_id]
        for lease_id in lease_ids:
            self.end(lease_id, LeaseEnd("region released"))
        with self._lock:
            self._tables.pop(region_id, None)

    def _tell(self, lease_id: str, terms: _Terms, why: LeaseEnd) -> None:
        if terms.on_end is None:
            return
        try:
            terms.on_end(lease_id, why)
        except Exception:
            log.exception("what was to be done at the end of lease %s failed", lease_id)
