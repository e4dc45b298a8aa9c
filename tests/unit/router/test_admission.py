"""Who goes next, who is turned away, and what they are told."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyphase.core.ids import RequestId
from polyphase.router import AdmissionQueue, AdmissionSettings, Queued, Rejected, RejectReason, Ticket
from polyphase.router.fair_share import FairShare
from polyphase.router.service_rate import ServiceRate

S = 10**9


class Arrivals:
    def __init__(self) -> None:
        self.count = 0

    def ticket(self, tenant: str = "a", *, cost: int = 100, priority: int = 0, now_s: float = 0, deadline_s: float = 1000) -> Ticket:
        self.count += 1
        return Ticket(RequestId(f"r{self.count}"), self.count, tenant, priority, cost, int(now_s * S), int(deadline_s * S))


@pytest.fixture
def arrivals() -> Arrivals:
    return Arrivals()


def queue_of(**settings: object) -> AdmissionQueue:
    return AdmissionQueue(AdmissionSettings(**settings))  # type: ignore[arg-type]


def drained(queue: AdmissionQueue, now_ns: int = 0) -> list[Ticket]:
    taken = []
    while (ticket := queue.take(now_ns)) is not None:
        taken.append(ticket)
    return taken


def running_at(queue: AdmissionQueue, arrivals: Arrivals, tokens_per_s: int) -> int:
    """Let the queue learn how fast it goes. Returns: the time then; one ticket of another tenant, of 1 token, waits."""
    queue.offer(arrivals.ticket("filler", cost=1), 0)
    for second in range(1, 6):
        queue.offer(arrivals.ticket("worked off", cost=tokens_per_s, priority=-1), (second - 1) * S)
        queue.take(second * S)
    return 5 * S


def test_priority_then_deadline_then_arrival(arrivals: Arrivals) -> None:
    queue = queue_of()
    late, urgent, first, second, soon = (
        arrivals.ticket(priority=5),
        arrivals.ticket(priority=-3),
        arrivals.ticket(),
        arrivals.ticket(),
        arrivals.ticket(deadline_s=10),
    )
    for ticket in (late, urgent, first, second, soon):
        assert isinstance(queue.offer(ticket, 0), Queued)
    assert drained(queue) == [urgent, soon, first, second, late]


def test_a_flood_leaves_the_other_tenant_its_half(arrivals: Arrivals) -> None:
    queue = queue_of()
    for _ in range(1000):
        queue.offer(arrivals.ticket("flood"), 0)
    for _ in range(50):
        queue.offer(arrivals.ticket("calm"), 0)
    first = Counter(ticket.tenant for ticket in drained(queue)[:100])
    assert first == {"flood": 50, "calm": 50}


def test_long_prompts_count_for_more(arrivals: Arrivals) -> None:
    queue = queue_of()
    for _ in range(100):
        queue.offer(arrivals.ticket("long", cost=1000), 0)
        queue.offer(arrivals.ticket("short", cost=100), 0)
    served: Counter[str] = Counter()
    while served["short"] < 5000:
        ticket = queue.take(0)
        assert ticket is not None
        served[ticket.tenant] += ticket.cost_tokens
    assert abs(served["long"] - served["short"]) <= 1000


def test_what_was_cached_is_not_charged(arrivals: Arrivals) -> None:
    queue = queue_of()
    for _ in range(100):
        queue.offer(arrivals.ticket("cached", cost=1000), 0)
        queue.offer(arrivals.ticket("other", cost=1000), 0)
    served: Counter[str] = Counter()
    for _ in range(60):
        ticket = queue.take(0)
        assert ticket is not None
        served[ticket.tenant] += 1
        if ticket.tenant == "cached":
            queue.refund(ticket, 900)
    # A tenth of the work each; it is never charged for the next one in advance by more than that one's full prompt.
    assert served["cached"] >= 5 * served["other"]


@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=2, max_size=5),
    costs=st.lists(st.integers(1, 300), min_size=40, max_size=200),
)
def test_shares_are_as_the_weights(weights: list[float], costs: list[int]) -> None:
    """While all have something waiting, served work per weight differs by no more than one request of each."""
    names = [f"t{number}" for number in range(len(weights))]
    by_name = dict(zip(names, weights, strict=True))
    share, arrivals = FairShare(by_name), Arrivals()
    for number, cost in enumerate(costs):
        share.add(arrivals.ticket(names[number % len(names)], cost=cost))
    served = dict.fromkeys(names, 0.0)
    while all(share.count_of(name) for name in names):
        ticket = share.take()
        served[ticket.tenant] += ticket.cost_tokens / by_name[ticket.tenant]
        spread = max(served.values()) - min(served.values())
        assert spread <= 300 / min(weights) + 300 / min(weights), served


def test_new_tenants_without_end_starve_nobody(arrivals: Arrivals) -> None:
    """Each request under another name: whoever waits already is passed by one of them at most for each of equal cost."""
    queue = queue_of()
    old = [arrivals.ticket("old"), arrivals.ticket("old")]
    for ticket in old:
        queue.offer(ticket, 0)
    order = []
    for number in range(20):
        queue.offer(arrivals.ticket(f"new-{number}"), 0)
        ticket = queue.take(0)
        assert ticket is not None
        order.append(ticket)
    assert set(old) <= set(order[:6])


def test_a_tenant_saves_nothing_up(arrivals: Arrivals) -> None:
    queue = queue_of()
    for _ in range(100):
        queue.offer(arrivals.ticket("busy"), 0)
    for _ in range(50):
        queue.take(0)
    for _ in range(50):
        queue.offer(arrivals.ticket("late"), 0)
    assert Counter(ticket.tenant for ticket in drained(queue)[:20]) == {"busy": 10, "late": 10}


def test_a_full_queue_gives_way_to_the_urgent_and_to_whoever_has_less(arrivals: Arrivals) -> None:
    queue = queue_of(max_requests=4)
    flood = [arrivals.ticket("flood") for _ in range(4)]
    for ticket in flood:
        queue.offer(ticket, 0)
    assert queue.offer(arrivals.ticket("flood"), 0) == Rejected(RejectReason.QUEUE_FULL, "4 requests wait already, which is the limit", 2)
    outcome = queue.offer(arrivals.ticket("calm"), 0)
    assert isinstance(outcome, Queued)
    assert outcome.displaced is flood[3]
    urgent = queue.offer(arrivals.ticket("flood", priority=-1), 0)
    assert isinstance(urgent, Queued)
    assert urgent.displaced is flood[2]
    less = queue.offer(arrivals.ticket("calm", priority=1), 0)
    assert isinstance(less, Rejected)
    assert len(queue) == 4


def test_one_tenant_may_be_limited(arrivals: Arrivals) -> None:
    queue = queue_of(max_requests_per_tenant=2)
    assert all(isinstance(queue.offer(arrivals.ticket("a", priority=number), 0), Queued) for number in range(2))
    outcome = queue.offer(arrivals.ticket("a"), 0)
    assert isinstance(outcome, Rejected)
    assert outcome.reason is RejectReason.TENANT_FULL
    assert isinstance(queue.offer(arrivals.ticket("b"), 0), Queued)


def test_what_would_come_too_late_is_rejected_with_an_honest_time(arrivals: Arrivals) -> None:
    """1,000 tokens per second; 20,000 wait: who must begin within 5 s may come again in 15."""
    queue = queue_of()
    now_ns = running_at(queue, arrivals, 1000)
    for _ in range(20):
        queue.offer(arrivals.ticket("a", cost=1000, priority=1), now_ns)
    late = queue.offer(arrivals.ticket("a", priority=2, now_s=5, deadline_s=10), now_ns)
    assert isinstance(late, Rejected)
    assert late.reason is RejectReason.DEADLINE
    assert 14 <= late.retry_after_s <= 17
    assert "has to within 5.0 s" in late.message
    # What goes first need not wait for all of it: the urgent, another tenant, and of the same tenant those with an earlier deadline.
    for sooner in ({"priority": 0}, {"tenant": "b", "priority": 1}, {"priority": 1}):
        outcome = queue.offer(arrivals.ticket(now_s=5, deadline_s=10, **sooner), now_ns)  # type: ignore[arg-type]
        assert isinstance(outcome, Queued), sooner
        assert outcome.expected_wait_ns is not None
        assert outcome.expected_wait_ns < 1 * S
    assert isinstance(queue.offer(arrivals.ticket("a", priority=2, now_s=5, deadline_s=100), now_ns), Queued)


def test_a_deadline_that_has_passed_is_rejected_even_if_nothing_waits(arrivals: Arrivals) -> None:
    outcome = queue_of().offer(arrivals.ticket(deadline_s=1), 2 * S)
    assert isinstance(outcome, Rejected)
    assert outcome.retry_after_s == 1


def test_nobody_is_rejected_for_a_pace_that_is_not_known(arrivals: Arrivals) -> None:
    queue = queue_of()
    for _ in range(100):
        outcome = queue.offer(arrivals.ticket(cost=10**6, deadline_s=1), 0)
        assert isinstance(outcome, Queued)
    assert outcome.expected_wait_ns is None


def test_nobody_is_rejected_because_the_first_one_takes_its_time(arrivals: Arrivals) -> None:
    """Nothing has left for a second: where each takes two, the next one goes in a moment. A long standstill says more."""
    queue = queue_of()
    for _ in range(5):
        queue.offer(arrivals.ticket(cost=500), 0)
    early = queue.offer(arrivals.ticket(cost=500, priority=1, now_s=1, deadline_s=11), 1 * S)
    assert isinstance(early, Queued)
    assert early.expected_wait_ns is not None
    assert 2 * S < early.expected_wait_ns < 6 * S
    late = queue.offer(arrivals.ticket(cost=500, priority=1, now_s=9, deadline_s=19), 9 * S)
    assert isinstance(late, Rejected)
    assert 15 <= late.retry_after_s <= 60


def test_those_whose_time_has_come_leave(arrivals: Arrivals) -> None:
    queue = queue_of()
    soon, later, gone = arrivals.ticket(deadline_s=1), arrivals.ticket(deadline_s=2), arrivals.ticket(deadline_s=0.5)
    for ticket in (later, soon, gone):
        queue.offer(ticket, 0)
    queue.remove(gone, 0)
    assert queue.expire(S) == [soon]
    assert queue.next_deadline_ns() == 2 * S
    assert queue.clear(S) == [later]
    assert queue.next_deadline_ns() is None


def test_pace_counts_only_time_in_which_something_waits() -> None:
    rate = ServiceRate()
    assert rate.tokens_per_s(0, 0) is None
    rate.start(0)
    for second in range(1, 31):
        rate.note(500, second * S)
    assert rate.tokens_per_s(0, 30 * S) == pytest.approx(500, rel=0.06)
    rate.stop(30 * S)
    rate.start(1000 * S)
    assert rate.tokens_per_s(0, 1000 * S) == pytest.approx(500, rel=0.06)
    for second in range(1001, 1041):
        rate.note(100, second * S)
    assert rate.tokens_per_s(0, 1040 * S) == pytest.approx(100, rel=0.2)
    stalled = rate.tokens_per_s(0, 1060 * S)
    assert stalled is not None
    assert stalled < 20


@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=1, max_size=4),
    costs=st.lists(st.integers(1, 300), max_size=40),
    cost=st.integers(1, 300),
)
def test_the_expected_wait_is_what_comes_first(weights: list[float], costs: list[int], cost: int) -> None:
    """Never less than the truth by more than a request of each tenant, and never more than all that waits."""
    names = [f"t{number}" for number in range(len(weights))]
    share, arrivals = FairShare(dict(zip(names, weights, strict=True))), Arrivals()
    for number, one in enumerate(costs):
        share.add(arrivals.ticket(names[number % len(names)], cost=one))
    newcomer = arrivals.ticket(names[0], cost=cost)
    expected = share.tokens_before(newcomer)
    assert 0 <= expected <= share.tokens
    share.add(newcomer)
    truth = 0
    while (ticket := share.take()) is not newcomer:
        truth += ticket.cost_tokens
    assert truth <= expected + 300 * len(names)
