"""Requests that wait at the frontend because every worker they could go to is saturated: the queues of `router.admission`, with flights.

A *party* is all sequences of one HTTP request: they wait, leave and are turned out together. A *lane* is a queue of parties that wait
for the same workers: those of one model that carry the labels they require and pass on what they need, and where there are prefill
workers, with or without one of these. Nothing is done until something changes; who waits costs nothing but memory, and one timer for all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from polyphase.core.errors import Evicted, NoWorkers, Overloaded, PolyphaseError
from polyphase.frontend.flight import Flight
from polyphase.frontend.metrics import Metrics
from polyphase.frontend.terms import Terms
from polyphase.router import (
    AdmissionQueue,
    AdmissionSettings,
    EvictReason,
    Queued,
    Refusals,
    Rejected,
    Router,
    RouteRequest,
    Ticket,
)

BASE_COST_TOKENS = 64  # what a request costs beside its prompt, so that one that is cached all over is not free
LaneKey = tuple[str, str | None, bool, tuple[tuple[str, str], ...], bool, tuple[str, ...]]
"""Model, adapter, whether a prefill worker is needed, required labels, whether the output is structured, what its worker has to pass."""
PROBE_NS = 5_000_000_000  # a lane that stood still for so long sends one on: a worker's own answer brings its true load


@dataclass(slots=True, eq=False)
class Party:
    flights: list[Flight]  # those that still wait
    ticket: Ticket
    lane: Lane


@dataclass(slots=True, eq=False)
class Lane:
    key: LaneKey
    model: str
    probe: RouteRequest  # stands for all in it when a worker with headroom is looked for
    queue: AdmissionQueue
    moved_ns: int  # when one was last sent, or the first began to wait
    deserted_ns: int | None = None  # since when there is no worker at all

    @property
    def waits_for_prefill(self) -> bool:
        return self.key[2]

    @property
    def has_labels(self) -> bool:
        return bool(self.key[3])


@dataclass(frozen=True, slots=True)
class LaneView:
    """For people who look."""

    model: str
    waits_for_prefill: bool  # they need a prefill worker besides
    requests: int
    tokens: int
    oldest_wait_s: float
    drain_time_s: float | None


class WaitingRoom:
    def __init__(
        self, router: Router, refusals: Refusals, metrics: Metrics, settings: AdmissionSettings, no_worker_patience_s: float
    ) -> None:
        self._router = router
        self._refusals = refusals
        self._metrics = metrics
        self._settings = settings
        self._patience_ns = int(no_worker_patience_s * 1e9)
        # Kept when empty, for what was learned of their pace; but not those of labels, since these are clients' words.
        self._lanes: dict[LaneKey, Lane] = {}
        self._parties: dict[Ticket, Party] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        """Parties."""
        return len(self._parties)

    def must_wait(self, request: RouteRequest) -> bool:
        """Whether others wait for the same workers, or all of these are saturated. Raises: NoWorkers."""
        if not self.has_headroom(request, request.now_ns):
            return True
        if not self._parties:
            return False
        lane = self._lanes.get(self.key_of(request))
        return lane is not None and len(lane.queue) > 0

    def has_headroom(self, request: RouteRequest, now_ns: int) -> bool:
        """Whether a worker would begin with it soon that has not refused something a moment ago. Raises: NoWorkers."""
        return self._refusals.has_headroom(self._router.has_headroom, request, now_ns)

    def key_of(self, request: RouteRequest) -> LaneKey:
        """What it has in common with those that wait for the same workers. Raises: NoWorkers."""
        labels = tuple(sorted(request.required_labels.items()))
        needs = tuple(sorted(request.needs))
        return (request.model, request.adapter, self._router.waits_for_prefill(request), labels, request.has_grammar, needs)

    def enter(self, flights: list[Flight], request: RouteRequest, terms: Terms, now_ns: int) -> Party | None:
        """Let them wait; `request` is that of the first one.

        Returns: a party that had to go for it, which the caller answers. Raises: Overloaded if they had better not wait; NoWorkers.
        """
        key = self.key_of(request)
        lane = self._lanes.get(key)
        if lane is None:
            lane = Lane(key, request.model, request, AdmissionQueue(self._settings), now_ns)
        elif not lane.queue:
            lane.moved_ns = now_ns
        self._arrivals += 1
        ticket = Ticket(
            request_id=request.request_id,
            number=self._arrivals,
            tenant=terms.tenant,
            priority=flights[0].job.priority,
            cost_tokens=sum(flight.job.prompt_token_count + BASE_COST_TOKENS for flight in flights),
            arrived_ns=now_ns,
            deadline_ns=terms.leave_by_ns,
        )
        outcome = lane.queue.offer(ticket, now_ns)
        if isinstance(outcome, Rejected):
            self._metrics.rejections_of_queue.labels(lane.model, outcome.reason.value).inc()
            raise Overloaded(
                f"every worker of the model {lane.model!r} is busy, and {outcome.message}",
                retry_after_s=outcome.retry_after_s,
                request_id=request.request_id,
            )
        self._lanes[key] = lane
        party = self._parties[ticket] = Party(flights, ticket, lane)
        self._metrics.queued_requests.labels(lane.model).inc()
        detail = f"every worker is busy, and {_who_waits(outcome)}"
        for flight in flights:
            flight.party = party
            flight.record.queued_ns = now_ns
            flight.record.history.note(now_ns, "queued", detail=detail)
        return self._out(outcome.displaced) if outcome.displaced is not None else None

    def leave(self, flight: Flight, now_ns: int) -> None:
        """Its client went away, or its time is over. Others of its party go on waiting. Flights that do not wait are ignored."""
        party = flight.party
        if party is not None and party.ticket in self._parties:
            party.flights.remove(flight)
            flight.party = None
            if not party.flights:
                party.lane.queue.remove(party.ticket, now_ns)
                self._out(party.ticket)

    def take(self, now_ns: int, skipped: Collection[LaneKey]) -> Party | None:
        """The next party that a worker has headroom for, the most urgent first; it waits no longer. `skipped` lanes are left alone.

        Owner: the caller sends it, or puts it back.
        """
        for lane in self._busy_lanes():
            if lane.key in skipped or not self._can_move(lane, now_ns):
                continue
            ticket = lane.queue.take(now_ns)
            assert ticket is not None
            return self._out(ticket)
        return None

    def put_back(self, party: Party, now_ns: int) -> None:
        """No worker took it after all: it goes next."""
        party.lane.queue.put_back(party.ticket, now_ns)
        self._lanes[party.lane.key] = party.lane
        self._parties[party.ticket] = party
        self._metrics.queued_requests.labels(party.lane.model).inc()
        for flight in party.flights:
            flight.party = party

    def note_sent(self, party: Party, cached_tokens: int, now_ns: int) -> None:
        """It is with a worker. `cached_tokens` of its prompts need not be computed, so its tenant is not charged for them."""
        party.lane.moved_ns = now_ns
        party.lane.queue.refund(party.ticket, cached_tokens)
        self._metrics.of(party.lane.model).queue_wait_s.observe((now_ns - party.ticket.arrived_ns) / 1e9)

    def turn_out(self, now_ns: int) -> Iterator[tuple[Party, EvictReason]]:
        """Those whose time has come, and those for whom no worker is left. Owner: the caller answers them."""
        for lane in self._busy_lanes():
            for ticket in lane.queue.expire(now_ns):
                yield self._out(ticket), EvictReason.DEADLINE
            if lane.deserted_ns is not None and now_ns - lane.deserted_ns >= self._patience_ns:
                for ticket in lane.queue.clear(now_ns):
                    yield self._out(ticket), EvictReason.NO_WORKERS

    def eviction(self, party: Party, reason: EvictReason, now_ns: int) -> PolyphaseError:
        """Counts it. Returns: what to tell its client."""
        lane, ticket = party.lane, party.ticket
        self._metrics.evictions.labels(lane.model, reason.value).inc()
        waited_s = (now_ns - ticket.arrived_ns) / 1e9
        if reason is EvictReason.NO_WORKERS:
            return NoWorkers(f"the last worker of the model {lane.model!r} is gone, and no other came", retry_after_s=5)
        why = {
            EvictReason.DISPLACED: "it had to make room for one that goes first",
            EvictReason.DEADLINE: "no worker had room for it by its deadline",
        }[reason]
        return Evicted(f"after {waited_s:.1f} s in the queue, {why}", retry_after_s=lane.queue.retry_after_s(now_ns))

    def lanes(self, now_ns: int) -> list[LaneView]:
        """Those in which something waits."""
        return [
            LaneView(
                lane.model,
                lane.waits_for_prefill,
                len(lane.queue),
                lane.queue.tokens,
                max((now_ns - ticket.arrived_ns) / 1e9 for ticket in self._parties if ticket in lane.queue),
                lane.queue.drain_time_s(now_ns),
            )
            for lane in self._busy_lanes()
        ]

    def _busy_lanes(self) -> Iterable[Lane]:
        if not self._parties:
            return ()
        return sorted((lane for lane in self._lanes.values() if lane.queue), key=_urgency)

    def _can_move(self, lane: Lane, now_ns: int) -> bool:
        try:
            has_headroom = self.has_headroom(lane.probe, now_ns)
        except NoWorkers:
            lane.deserted_ns = now_ns if lane.deserted_ns is None else lane.deserted_ns
            return False
        lane.deserted_ns = None
        if not has_headroom and now_ns - lane.moved_ns >= PROBE_NS:
            lane.moved_ns = now_ns
            return True
        return has_headroom

    def _out(self, ticket: Ticket) -> Party:
        party = self._parties.pop(ticket)
        self._metrics.queued_requests.labels(party.lane.model).dec()
        if not party.lane.queue and party.lane.has_labels:  # clients may think of any labels
            self._lanes.pop(party.lane.key, None)
        for flight in party.flights:
            flight.party = None
        return party


def _who_waits(queued: Queued) -> str:
    count, wait_ns = queued.requests_before, queued.expected_wait_ns
    if not count:
        return "nobody waits before it"
    expected = "" if wait_ns is None else f"; its turn was expected in {wait_ns / 1e9:.1f} s"
    return f"{count} {'waits' if count == 1 else 'wait'} already{expected}"


def _urgency(lane: Lane) -> int:
    first = lane.queue.first_priority
    return 0 if first is None else first
