"""What has been promised to each worker and is not over yet: prefill tokens and KV blocks, per request.

    route ──────────► prefill ends ──────► end of the request, however it ends
    prefill tokens    none                 nothing
    blocks            blocks               nothing
    (both legs)       (decode leg only)

A worker's own load report lags behind by what was routed to it since; so each worker's *unreported* share is kept apart: the bookings
made after its latest report. Reported load plus the unreported share counts nothing twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from polyphase.core.ids import RequestId, WorkerId


class LegBooking(msgspec.Struct, frozen=True):
    """What one leg of a request will take at one worker. The prefill leg of a split request ends with its prefill."""

    worker_id: WorkerId
    prefill_tokens: int
    block_count: int
    ends_with_prefill: bool = False


@dataclass(slots=True)
class Booked:
    """Sums over bookings."""

    prefill_tokens: int = 0
    block_count: int = 0
    request_count: int = 0

    def add(self, prefill_tokens: int, block_count: int, request_count: int) -> None:
        self.prefill_tokens += prefill_tokens
        self.block_count += block_count
        self.request_count += request_count

    def is_zero(self) -> bool:
        return not (self.prefill_tokens or self.block_count or self.request_count)


@dataclass(slots=True)
class _Entry:
    leg: LegBooking
    report: int  # reports of the worker so far when this was booked
    prefill_tokens: int  # of the leg, until its prefill ends


class _WorkerLedger:
    """One worker's sums; `report` counts its load reports."""

    __slots__ = ("all", "report", "unreported")

    def __init__(self) -> None:
        self.all = Booked()
        self.unreported = Booked()
        self.report = 0

    def add(self, entry: _Entry, sign: int) -> None:
        prefill_tokens, block_count = sign * entry.prefill_tokens, sign * entry.leg.block_count
        self.all.add(prefill_tokens, block_count, sign)
        if entry.report == self.report:
            self.unreported.add(prefill_tokens, block_count, sign)

    def end_prefill(self, entry: _Entry) -> None:
        """The leg stays, without its prefill tokens."""
        self.all.prefill_tokens -= entry.prefill_tokens
        if entry.report == self.report:
            self.unreported.prefill_tokens -= entry.prefill_tokens
        entry.prefill_tokens = 0


class Bookings:
    """Every call is idempotent, and unknown requests and workers are ignored: an end may be told twice, or after a worker is gone."""

    def __init__(self) -> None:
        self._entries: dict[RequestId, list[_Entry]] = {}
        self._ledgers: dict[WorkerId, _WorkerLedger] = {}
        self._requests: dict[WorkerId, set[RequestId]] = {}
        self._changed: set[WorkerId] = set()

    def take_changed(self) -> set[WorkerId]:
        """Workers whose sums changed since the last call."""
        changed, self._changed = self._changed, set()
        return changed

    def book(self, request_id: RequestId, legs: Sequence[LegBooking]) -> None:
        """Replaces what this request had booked before: a migrated request is booked anew. One leg per worker.

        Owner: the caller, who must call `release` at the request's end, however it ends.
        """
        if request_id in self._entries:
            self.release(request_id)
        entries = []
        for leg in legs:
            worker_id = leg.worker_id
            ledger = self._ledgers.get(worker_id)
            if ledger is None:
                ledger = self._ledgers[worker_id] = _WorkerLedger()
            if worker_id not in self._requests:
                self._requests[worker_id] = set()
            entry = _Entry(leg, ledger.report, leg.prefill_tokens)
            ledger.add(entry, +1)
            self._changed.add(worker_id)
            self._requests[worker_id].add(request_id)
            entries.append(entry)
        if entries:
            self._entries[request_id] = entries

    def end_prefill(self, request_id: RequestId) -> None:
        """The first token is there: no prefill tokens remain, and a leg that was for prefill only is over."""
        entries = self._entries.get(request_id)
        if entries is None:
            return
        is_over = False
        for entry in entries:
            leg = entry.leg
            self._changed.add(leg.worker_id)
            if leg.ends_with_prefill:
                is_over = True
                self._ledgers[leg.worker_id].add(entry, -1)
                self._requests[leg.worker_id].discard(request_id)
            else:
                self._ledgers[leg.worker_id].end_prefill(entry)
        if is_over:
            self._keep(request_id, [entry for entry in entries if not entry.leg.ends_with_prefill])

    def release(self, request_id: RequestId) -> None:
        for entry in self._entries.pop(request_id, ()):
            self._changed.add(entry.leg.worker_id)
            self._ledgers[entry.leg.worker_id].add(entry, -1)
            self._requests[entry.leg.worker_id].discard(request_id)

    def drop_worker(self, worker_id: WorkerId) -> None:
        """The worker is gone, and what was booked on it with it. Other legs of the same requests stay."""
        for request_id in self._requests.pop(worker_id, set()):
            self._keep(request_id, [entry for entry in self._entries[request_id] if entry.leg.worker_id != worker_id])
        self._ledgers.pop(worker_id, None)
        self._changed.add(worker_id)

    def mark_reported(self, worker_id: WorkerId) -> None:
        """The worker has told its load: what is booked from now on is not in that figure."""
        ledger = self._ledgers.setdefault(worker_id, _WorkerLedger())
        ledger.report += 1
        ledger.unreported = Booked()
        self._changed.add(worker_id)

    def of(self, worker_id: WorkerId) -> Booked:
        ledger = self._ledgers.get(worker_id)
        return ledger.all if ledger else Booked()

    def sums_of(self, worker_id: WorkerId) -> tuple[Booked, Booked]:
        """All that is booked there, and the unreported share of it."""
        ledger = self._ledgers.get(worker_id)
        return (ledger.all, ledger.unreported) if ledger else (Booked(), Booked())

    def total(self) -> Booked:
        """Over all workers; zero when no request is under way. A split request counts once per leg."""
        total = Booked()
        for ledger in self._ledgers.values():
            total.prefill_tokens += ledger.all.prefill_tokens
            total.block_count += ledger.all.block_count
            total.request_count += ledger.all.request_count
        return total

    def check(self) -> None:
        """Invariants: every sum equals what its entries add up to, and no empty booking is kept.

        Raises: AssertionError. Cost: O(bookings); for tests and the simulator.
        """
        sums: dict[WorkerId, _WorkerLedger] = {}
        requests: dict[WorkerId, set[RequestId]] = {}
        for request_id, entries in self._entries.items():
            assert entries, f"{request_id} is booked with nothing"
            assert len({entry.leg.worker_id for entry in entries}) == len(entries), f"{request_id} has two legs on one worker"
            for entry in entries:
                worker_id = entry.leg.worker_id
                ledger = sums.setdefault(worker_id, _WorkerLedger())
                ledger.report = self._ledgers[worker_id].report
                ledger.add(entry, +1)
                requests.setdefault(worker_id, set()).add(request_id)
        for worker_id, kept in self._ledgers.items():
            expected = sums.pop(worker_id, _WorkerLedger())
            assert kept.all == expected.all, f"{worker_id}: {kept.all} kept, {expected.all} booked"
            assert kept.unreported == expected.unreported, f"{worker_id}: {kept.unreported} unreported kept, {expected.unreported} booked"
        assert not sums, f"bookings on unknown workers {sorted(sums)}"
        assert {worker_id: ids for worker_id, ids in self._requests.items() if ids} == requests, "requests by worker differ"

    def _keep(self, request_id: RequestId, entries: list[_Entry]) -> None:
        if entries:
            self._entries[request_id] = entries
        else:
            self._entries.pop(request_id, None)
