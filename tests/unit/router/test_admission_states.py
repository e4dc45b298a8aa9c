"""The queue against a naive model of it: any order of arrivals, departures and deadlines."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from polyphase.core.ids import RequestId
from polyphase.router import AdmissionQueue, AdmissionSettings, Queued, Rejected, RejectReason, Ticket

WEIGHTS = {"heavy": 4.0, "light": 0.5}
TENANTS = st.sampled_from(["heavy", "light", "a", "b", "c"])


@dataclass
class NaiveClass:
    """One priority: lists, searched from end to end."""

    starts: dict[str, float] = field(default_factory=dict)
    now: float = 0.0
    tickets: list[Ticket] = field(default_factory=list)

    def of(self, tenant: str) -> list[Ticket]:
        return sorted(
            (ticket for ticket in self.tickets if ticket.tenant == tenant), key=lambda ticket: (ticket.deadline_ns, ticket.number)
        )

    def turns(self) -> dict[str, float]:
        names = {ticket.tenant for ticket in self.tickets}
        return {name: self.starts[name] + self.of(name)[0].cost_tokens / WEIGHTS.get(name, 1.0) for name in names}

    def add(self, ticket: Ticket) -> None:
        self.starts.setdefault(ticket.tenant, self.now)
        self.tickets.append(ticket)

    def remove(self, ticket: Ticket) -> None:
        self.tickets.remove(ticket)
        if not self.of(ticket.tenant):
            del self.starts[ticket.tenant]


class QueueMachine(RuleBasedStateMachine):
    @initialize(limit=st.integers(0, 8), per_tenant=st.none() | st.integers(1, 4))
    def begin(self, limit: int, per_tenant: int | None) -> None:
        self.limits = AdmissionSettings(max_requests=limit, max_requests_per_tenant=per_tenant, weights=WEIGHTS)
        self.queue = AdmissionQueue(self.limits)
        self.classes: dict[int, NaiveClass] = {}
        self.now_ns = 0
        self.number = 0
        self.last: Ticket | None = None  # taken, and nothing happened since
        self.queued: set[Ticket] = set()
        self.left: list[Ticket] = []

    def waiting(self) -> list[Ticket]:
        return [ticket for one in self.classes.values() for ticket in one.tickets]

    def forget(self, ticket: Ticket) -> None:
        self.classes[ticket.priority].remove(ticket)
        if not self.classes[ticket.priority].tickets:
            del self.classes[ticket.priority]
        self.left.append(ticket)

    @rule(tenant=TENANTS, priority=st.integers(0, 2), cost=st.integers(1, 500), seconds=st.integers(1, 20))
    def arrive(self, tenant: str, priority: int, cost: int, seconds: int) -> None:
        self.last = None
        self.number += 1
        deadline_ns = self.now_ns + seconds * 10**9
        ticket = Ticket(RequestId(f"r{self.number}"), self.number, tenant, priority, cost, self.now_ns, deadline_ns)
        before = self.waiting()
        own = [one for one in before if one.tenant == tenant]
        outcome = self.queue.offer(ticket, self.now_ns)
        if isinstance(outcome, Rejected):
            assert outcome.retry_after_s >= 1
            match outcome.reason:
                case RejectReason.TENANT_FULL:
                    assert self.limits.max_requests_per_tenant is not None
                    assert len(own) >= self.limits.max_requests_per_tenant
                case RejectReason.QUEUE_FULL:
                    assert len(before) == self.limits.max_requests
                    assert all(one.priority <= priority for one in before), "less urgent ones wait"
                case RejectReason.DEADLINE:
                    assert before, "it was refused though nothing waits"
            return
        assert isinstance(outcome, Queued)
        if outcome.displaced is not None:
            out = outcome.displaced
            assert len(before) == self.limits.max_requests
            assert out.priority == max(one.priority for one in before)
            assert out.priority >= priority
            if out.priority == priority:
                share = {name: sum(one.tenant == name for one in before if one.priority == priority) for name in (tenant, out.tenant)}
                assert out.tenant != tenant
                own_share = (share[tenant] + 1) / WEIGHTS.get(tenant, 1.0)
                assert own_share <= (share[out.tenant] - 1) / WEIGHTS.get(out.tenant, 1.0)
            assert out is self.classes[out.priority].of(out.tenant)[-1]
            self.forget(out)
        self.classes.setdefault(priority, NaiveClass()).add(ticket)
        self.queued.add(ticket)

    @rule()
    def take(self) -> None:
        ticket = self.queue.take(self.now_ns)
        self.last = ticket
        if ticket is None:
            assert not self.waiting()
            return
        one = self.classes[min(self.classes)]
        turns = one.turns()
        turn = turns[ticket.tenant]
        assert abs(turn - min(turns.values())) < 1e-6, "it was another tenant's turn"
        assert ticket is one.of(ticket.tenant)[0], "not the first of its tenant"
        one.starts[ticket.tenant] = turn
        one.now = max(one.now, turn)
        self.forget(ticket)

    @precondition(lambda self: self.last is not None)
    @rule(is_sent=st.booleans(), part=st.floats(0, 1))
    def decide(self, is_sent: bool, part: float) -> None:
        """It is sent, and something of it was cached; or no worker takes it, and it goes next."""
        ticket, self.last = self.last, None
        assert ticket is not None
        if is_sent:
            cached = int(part * (ticket.cost_tokens - 1))
            self.queue.refund(ticket, cached)
            one = self.classes.get(ticket.priority)
            if one is not None and ticket.tenant in one.starts:
                one.starts[ticket.tenant] -= cached / WEIGHTS.get(ticket.tenant, 1.0)
            return
        self.queue.put_back(ticket, self.now_ns)
        one = self.classes.setdefault(ticket.priority, NaiveClass())
        one.add(ticket)
        one.starts[ticket.tenant] -= ticket.cost_tokens / WEIGHTS.get(ticket.tenant, 1.0)
        self.left.remove(ticket)
        if ticket is one.of(ticket.tenant)[0]:
            taken = self.queue.take(self.now_ns)
            assert taken is not None
            assert taken.priority == ticket.priority
            self.queue.put_back(taken, self.now_ns)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.last = None
        waiting = sorted(self.waiting(), key=lambda ticket: ticket.number)
        if waiting:
            ticket = data.draw(st.sampled_from(waiting))
            self.queue.remove(ticket, self.now_ns)
            self.queue.remove(ticket, self.now_ns)
            self.forget(ticket)

    @rule(ms=st.integers(1, 5000))
    def time_passes(self, ms: int) -> None:
        self.last = None
        self.now_ns += ms * 10**6
        due = sorted((one for one in self.waiting() if one.deadline_ns <= self.now_ns), key=lambda one: (one.deadline_ns, one.number))
        assert self.queue.expire(self.now_ns) == due
        for ticket in due:
            self.forget(ticket)

    @invariant()
    def as_the_model_says(self) -> None:
        if not hasattr(self, "queue"):
            return
        self.queue.check()
        waiting = self.waiting()
        assert len(self.queue) == len(waiting)
        assert len(waiting) <= self.limits.max_requests + 1, "only one that was put back may be too many"
        assert all(ticket in self.queue for ticket in waiting)
        assert self.queue.tokens == sum(ticket.cost_tokens for ticket in waiting)
        assert self.queue.next_deadline_ns() == min((ticket.deadline_ns for ticket in waiting), default=None)
        assert len(self.left) == len(set(self.left)), "one left twice"
        assert self.queued == set(waiting) | set(self.left), "one was lost"


TestQueueStates = QueueMachine.TestCase
TestQueueStates.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
