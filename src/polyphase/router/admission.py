"""The queue in front of the router: what waits while every worker is saturated, who goes next, and who is told at once that it is in vain.

    order       priority class (lower first) → fair share between tenants (`fair_share`) → deadline → arrival

    newcomer    no place in it for its tenant ─────────────────────────────► rejected: tenant_full
                it would begin after its deadline, as fast as it goes now ─► rejected: deadline
                queue full ─┬─ of less urgent ones ────────────────────────► it waits, and the last of the least urgent is evicted
                            ├─ its tenant has fewer there than another ────► it waits, and the other's last one is evicted
                            └─ otherwise ──────────────────────────────────► rejected: queue_full
    waiting     its deadline has come ─────────────────────────────────────► evicted

Values in, decisions out: whoever calls tells the time, sends what is taken, and answers what is rejected or evicted. One queue holds the
requests that wait for the same workers.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from polyphase.router.fair_share import FairShare, Ticket
from polyphase.router.service_rate import ServiceRate

LONGEST_RETRY_S = 600
UNKNOWN_RETRY_S = 2  # as long as nothing is known of how fast it goes


@dataclass(frozen=True, slots=True)
class AdmissionSettings:
    max_requests: int = 4096  # waiting at once, in one queue; 0: nobody waits, so what cannot be sent at once is refused
    max_requests_per_tenant: int | None = None  # None: only bounded by `max_requests`, and by who else wants a place
    max_wait_s: float = 60.0  # for requests with a later deadline, or none
    weights: Mapping[str, float] = field(default_factory=dict)  # by tenant; 1 for all others


class RejectReason(StrEnum):
    QUEUE_FULL = "queue_full"
    TENANT_FULL = "tenant_full"
    DEADLINE = "deadline"


class EvictReason(StrEnum):
    DISPLACED = "displaced"
    DEADLINE = "deadline"
    NO_WORKERS = "no_workers"


@dataclass(frozen=True, slots=True)
class Queued:
    """`expected_wait_ns` is None while nothing is known of how fast it goes."""

    requests_before: int  # waiting, whatever the order
    expected_wait_ns: int | None
    displaced: Ticket | None = None  # evicted for it


@dataclass(frozen=True, slots=True)
class Rejected:
    """`message` ends a sentence on why."""

    reason: RejectReason
    message: str
    retry_after_s: int


class AdmissionQueue:
    """Every ticket that was queued leaves exactly once: by `take`, `remove`, `expire`, or as the `displaced` one of another."""

    def __init__(self, settings: AdmissionSettings) -> None:
        self._settings = settings
        self._weights = dict(settings.weights)
        self._classes: dict[int, FairShare] = {}  # by priority; without empty ones
        self._priorities: list[int] = []  # their keys in order
        self._tickets: set[Ticket] = set()
        self._deadlines: list[tuple[int, int, Ticket]] = []  # a heap, with some that have left
        self._rate = ServiceRate()

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, ticket: Ticket) -> bool:
        return ticket in self._tickets

    @property
    def tokens(self) -> int:
        """Of prefill, waiting."""
        return sum(share.tokens for share in self._classes.values())

    @property
    def first_priority(self) -> int | None:
        return self._priorities[0] if self._priorities else None

    def offer(self, ticket: Ticket, now_ns: int) -> Queued | Rejected:
        """Let it wait, or not. Owner: whoever calls answers a displaced ticket."""
        limit = self._settings.max_requests_per_tenant
        if limit is not None and sum(share.count_of(ticket.tenant) for share in self._classes.values()) >= limit:
            return self._reject(
                RejectReason.TENANT_FULL, f"{limit} requests of its tenant wait already, which is the limit", ticket, now_ns
            )
        wait_ns = self.expected_wait_ns(ticket, now_ns)
        if now_ns + (wait_ns or 0) >= ticket.deadline_ns:
            return self._too_late(ticket, wait_ns or 0, now_ns)
        displaced = None
        if len(self._tickets) >= self._settings.max_requests:
            displaced = self._displaced_by(ticket)
            if displaced is None:
                count = self._settings.max_requests
                why = f"{count} requests wait already, which is the limit" if count else "nothing is let wait here"
                return self._reject(RejectReason.QUEUE_FULL, why, ticket, now_ns)
            self.remove(displaced, now_ns)
        count = len(self._tickets)
        self._insert(ticket, now_ns).add(ticket)
        return Queued(count, wait_ns, displaced)

    def take(self, now_ns: int) -> Ticket | None:
        """The next one, charged with its `cost_tokens`. `put_back` undoes it; `refund` gives back what of it was cached."""
        if not self._priorities:
            return None
        priority = self._priorities[0]
        ticket = self._classes[priority].take()
        self._rate.note(ticket.cost_tokens, now_ns)
        self._leave(ticket, now_ns)
        return ticket

    def put_back(self, ticket: Ticket, now_ns: int) -> None:
        """It was taken, and no worker took it: it goes next, whatever the limits."""
        self._rate.note(-ticket.cost_tokens, now_ns)
        self._insert(ticket, now_ns).put_back(ticket)

    def refund(self, ticket: Ticket, tokens: int) -> None:
        """Of a ticket that was taken: so much of its prompt need not be computed."""
        share = self._classes.get(ticket.priority)
        if share is not None:
            share.refund(ticket, min(tokens, ticket.cost_tokens - 1))

    def remove(self, ticket: Ticket, now_ns: int) -> None:
        """Nobody wants it any more. Tickets that do not wait are ignored."""
        if ticket in self._tickets:
            self._classes[ticket.priority].remove(ticket)
            self._leave(ticket, now_ns)

    def expire(self, now_ns: int) -> list[Ticket]:
        """Take out those whose deadline has come, earliest first."""
        expired = []
        while (deadline_ns := self.next_deadline_ns()) is not None and deadline_ns <= now_ns:
            ticket = self._deadlines[0][2]
            self.remove(ticket, now_ns)
            expired.append(ticket)
        return expired

    def clear(self, now_ns: int) -> list[Ticket]:
        """Take out all, in the order of arrival."""
        tickets = sorted(self._tickets, key=lambda ticket: ticket.number)
        for ticket in tickets:
            self.remove(ticket, now_ns)
        return tickets

    def next_deadline_ns(self) -> int | None:
        while self._deadlines and self._deadlines[0][2] not in self._tickets:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def expected_wait_ns(self, ticket: Ticket, now_ns: int) -> int | None:
        """Until a ticket that came now would be taken, as fast as it goes now; None if that is unknown. 0 if nothing goes before it."""
        before = float(sum(share.tokens for priority, share in self._classes.items() if priority < ticket.priority))
        share = self._classes.get(ticket.priority)
        if share is not None:
            before += share.tokens_before(ticket)
        if not before:
            return 0
        rate = self._tokens_per_s(now_ns)
        return None if rate is None else int(min(before / rate, 1e6) * 1e9)

    def drain_time_s(self, now_ns: int) -> float | None:
        """Until all that waits now is taken; None if that is unknown."""
        rate = self._tokens_per_s(now_ns)
        return None if rate is None else self.tokens / rate

    def retry_after_s(self, now_ns: int) -> int:
        """When it makes sense to come again: what waits now is done by then."""
        seconds = self.drain_time_s(now_ns)
        return UNKNOWN_RETRY_S if seconds is None else _whole_s(seconds)

    def check(self) -> None:
        """Invariants. Raises: AssertionError. Cost: O(tickets log tickets)."""
        assert sorted(self._classes) == self._priorities, "classes and their order differ"
        assert all(share.count for share in self._classes.values()), "an empty class is kept"
        assert {ticket for share in self._classes.values() for ticket in share} == self._tickets
        assert {ticket for _, _, ticket in self._deadlines} >= self._tickets, "a deadline is not watched"
        assert len(self._deadlines) <= _slack(len(self._tickets)), "deadlines of those that left pile up"
        for share in self._classes.values():
            share.check()

    def _tokens_per_s(self, now_ns: int) -> float | None:
        """As if at least one of those that wait went now: where each takes two seconds, a second without any says nothing."""
        rate = self._rate.tokens_per_s(self.tokens // max(len(self._tickets), 1), now_ns)
        return None if rate is None else max(rate, 1e-3)

    def _displaced_by(self, ticket: Ticket) -> Ticket | None:
        if not self._priorities or ticket.priority > self._priorities[-1]:
            return None
        worst = self._classes[self._priorities[-1]]
        return worst.most_crowded(ticket.tenant if ticket.priority == self._priorities[-1] else None)

    def _insert(self, ticket: Ticket, now_ns: int) -> FairShare:
        """All of it but for the class, which the caller gives it to."""
        share = self._classes.get(ticket.priority)
        if share is None:
            share = self._classes[ticket.priority] = FairShare(self._weights)
            insort(self._priorities, ticket.priority)
        self._tickets.add(ticket)
        self._rate.start(now_ns)
        heapq.heappush(self._deadlines, (ticket.deadline_ns, ticket.number, ticket))
        return share

    def _leave(self, ticket: Ticket, now_ns: int) -> None:
        self._tickets.discard(ticket)
        if not self._classes[ticket.priority].count:
            del self._classes[ticket.priority]
            self._priorities.remove(ticket.priority)
        if not self._tickets:
            self._rate.stop(now_ns)
        if len(self._deadlines) > _slack(len(self._tickets)):
            self._deadlines = [entry for entry in self._deadlines if entry[2] in self._tickets]
            heapq.heapify(self._deadlines)

    def _reject(self, reason: RejectReason, message: str, ticket: Ticket, now_ns: int) -> Rejected:
        wait_ns = self.expected_wait_ns(ticket, now_ns) if reason is RejectReason.TENANT_FULL else None
        return Rejected(reason, message, self.retry_after_s(now_ns) if wait_ns is None else _whole_s(wait_ns / 1e9))

    def _too_late(self, ticket: Ticket, wait_ns: int, now_ns: int) -> Rejected:
        left_ns = max(ticket.deadline_ns - now_ns, 0)
        message = f"it would begin in {wait_ns / 1e9:.1f} s, as fast as it goes now, but has to within {left_ns / 1e9:.1f} s"
        return Rejected(RejectReason.DEADLINE, message, _whole_s((wait_ns - left_ns) / 1e9))


def _whole_s(seconds: float) -> int:
    return max(1, min(math.ceil(seconds), LONGEST_RETRY_S))


def _slack(ticket_count: int) -> int:
    return 2 * ticket_count + 64
