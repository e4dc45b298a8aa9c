"""Whose turn it is among tenants that wait at the same priority: each gets work in proportion to its weight, charged in tokens of prefill.

    tenant   start   waiting (by deadline, then arrival)   turn = start + cost of its first / weight
    acme     1200    [400, 80, 80 …]                       1600
    lab       900    [300]                                 1200   ← the least goes next; then its start is 1200, and so is `now`

`now` is the turn of whoever went last. A tenant that comes back starts there: what it did not ask for is not saved up, and a tenant that
never asked before owes nothing. A turn once given is only passed by turns that were given before, so nobody waits for ever, however many
new tenants come. A tenant without anything waiting is forgotten, so memory is bounded by what waits.

Source: S. J. Golestani, A self-clocked fair queueing scheme for broadband applications, INFOCOM 1994.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from polyphase.core.ids import RequestId


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """One request that waits. `number` counts arrivals; priorities are vLLM's: lower goes first."""

    request_id: RequestId
    number: int
    tenant: str
    priority: int
    cost_tokens: int  # of prefill, at least 1: what it takes if nothing of it is cached
    arrived_ns: int
    deadline_ns: int  # it must have been sent by then

    @property
    def rank(self) -> tuple[int, int]:
        """Within its tenant."""
        return (self.deadline_ns, self.number)


@dataclass(slots=True)
class _Tenant:
    weight: float
    start: float
    tickets: list[Ticket] = field(default_factory=list)  # by rank
    tokens: int = 0  # of the tickets
    stamp: int = 0  # of its only valid entry in the heap


class FairShare:
    """The tickets of one priority. A tenant that is not in `weights` weighs 1."""

    def __init__(self, weights: dict[str, float]) -> None:
        self._weights = weights
        self._tenants: dict[str, _Tenant] = {}
        self._turns: list[tuple[float, int, str]] = []  # (turn, stamp, tenant); those with an old stamp do not count
        self._stamps = 0
        self._now = 0.0
        self._weight_sum = 0.0  # of tenants with something waiting
        self.tokens = 0
        self.count = 0

    def __iter__(self) -> Iterator[Ticket]:
        return (ticket for tenant in self._tenants.values() for ticket in tenant.tickets)

    def count_of(self, tenant: str) -> int:
        known = self._tenants.get(tenant)
        return len(known.tickets) if known else 0

    def add(self, ticket: Ticket) -> None:
        self._insert(ticket, self._tenant(ticket.tenant))

    def put_back(self, ticket: Ticket) -> None:
        """It was taken and could not be sent: its turn comes again, next of all."""
        tenant = self._tenant(ticket.tenant)
        tenant.start -= ticket.cost_tokens / tenant.weight
        self._insert(ticket, tenant)
        self._queue_up(ticket.tenant, tenant)

    def remove(self, ticket: Ticket) -> None:
        """Raises: KeyError if it does not wait here."""
        tenant = self._tenants[ticket.tenant]
        place = bisect_left(tenant.tickets, ticket.rank, key=_rank)
        if place == len(tenant.tickets) or tenant.tickets[place] is not ticket:
            raise KeyError(ticket.request_id)
        del tenant.tickets[place]
        self._forget(ticket, tenant)
        if place == 0 and tenant.tickets:
            self._queue_up(ticket.tenant, tenant)

    def take(self) -> Ticket:
        """The one whose turn it is; its tenant is charged its `cost_tokens`. Raises: IndexError if none waits."""
        turn, stamp, name = self._turns[0]
        while self._tenants.get(name) is None or self._tenants[name].stamp != stamp:
            heapq.heappop(self._turns)
            turn, stamp, name = self._turns[0]
        tenant = self._tenants[name]
        ticket = tenant.tickets[0]
        tenant.start = turn
        self._now = max(self._now, turn)
        self.remove(ticket)
        return ticket

    def refund(self, ticket: Ticket, tokens: int) -> None:
        """Of what `take` charged: so much of the prompt was cached. Forgotten if its tenant has nothing waiting."""
        tenant = self._tenants.get(ticket.tenant)
        if tenant is not None and tokens:
            tenant.start -= tokens / tenant.weight
            self._queue_up(ticket.tenant, tenant)

    def tokens_before(self, ticket: Ticket) -> float:
        """Work that goes before a ticket that would come now, if all that wait go on waiting.

        Until its turn comes, its tenant does its own work ahead of it, and every other its share meanwhile; but no more than there is.
        Cost: O(own tickets that would be passed).
        """
        tenant = self._tenants.get(ticket.tenant)
        weight = tenant.weight if tenant else self._weight_of(ticket.tenant)
        weight_sum = self._weight_sum + (0.0 if tenant else weight)
        own = ticket.cost_tokens
        passed = 0
        if tenant is not None:
            passed = sum(one.cost_tokens for one in tenant.tickets[bisect_left(tenant.tickets, ticket.rank, key=_rank) :])
            own += tenant.tokens - passed
        return min(self.tokens - passed, own * weight_sum / weight - ticket.cost_tokens)

    def most_crowded(self, newcomer: str | None) -> Ticket | None:
        """The last ticket of the tenant with most waiting for its weight; None if it would not have more than `newcomer` then.

        Without a newcomer, always a ticket. Cost: O(tenants).
        """
        name, tenant = max(self._tenants.items(), key=lambda item: len(item[1].tickets) / item[1].weight)
        if newcomer is not None:
            own = (self.count_of(newcomer) + 1) / self._weight_of(newcomer)
            if name == newcomer or own > (len(tenant.tickets) - 1) / tenant.weight:
                return None
        return tenant.tickets[-1]

    def check(self) -> None:
        """Invariants. Raises: AssertionError."""
        assert all(tenant.tickets for tenant in self._tenants.values()), "a tenant without tickets is kept"
        assert all(tenant.tickets == sorted(tenant.tickets, key=_rank) for tenant in self._tenants.values())
        assert self.count == sum(len(tenant.tickets) for tenant in self._tenants.values())
        assert self.tokens == sum(ticket.cost_tokens for ticket in self)
        assert abs(self._weight_sum - sum(tenant.weight for tenant in self._tenants.values())) < 1e-6
        valid = [name for _, stamp, name in self._turns if name in self._tenants and self._tenants[name].stamp == stamp]
        assert sorted(valid) == sorted(self._tenants), "not every tenant has exactly one turn"
        assert len(self._turns) <= _slack(len(self._tenants)), "turns that do not count pile up"

    def _weight_of(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def _tenant(self, name: str) -> _Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(self._weight_of(name), self._now)
            self._weight_sum += tenant.weight
        return tenant

    def _insert(self, ticket: Ticket, tenant: _Tenant) -> None:
        insort(tenant.tickets, ticket, key=_rank)
        tenant.tokens += ticket.cost_tokens
        self.tokens += ticket.cost_tokens
        self.count += 1
        if tenant.tickets[0] is ticket:
            self._queue_up(ticket.tenant, tenant)

    def _forget(self, ticket: Ticket, tenant: _Tenant) -> None:
        tenant.tokens -= ticket.cost_tokens
        self.tokens -= ticket.cost_tokens
        self.count -= 1
        if not tenant.tickets:
            del self._tenants[ticket.tenant]
            self._weight_sum -= tenant.weight
            self._tidy()

    def _queue_up(self, name: str, tenant: _Tenant) -> None:
        """The tenant's turn is reckoned anew."""
        self._stamps += 1
        tenant.stamp = self._stamps
        heapq.heappush(self._turns, (tenant.start + tenant.tickets[0].cost_tokens / tenant.weight, tenant.stamp, name))
        self._tidy()

    def _tidy(self) -> None:
        if len(self._turns) > _slack(len(self._tenants)):
            self._turns = [turn for turn in self._turns if turn[2] in self._tenants and self._tenants[turn[2]].stamp == turn[1]]
            heapq.heapify(self._turns)


def _slack(tenant_count: int) -> int:
    return 2 * tenant_count + 64


def _rank(ticket: Ticket) -> tuple[int, int]:
    return ticket.rank
