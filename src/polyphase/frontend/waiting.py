"""Those that wait: in the queue because every worker is saturated, or ahead of it because an answer was promised to them already.

    queue      requests that no worker has seen, in the order of `waiting_room`; they are routed when they leave it
    stranded   flights that were broken off or handed back, or that a worker refused, until there is room again

Whenever something changes, `let_in` sends on as many as find room: first the stranded, then the queue. A timer looks after them as long as
anybody waits, and only then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from polyphase.core.clock import Clock
from polyphase.core.errors import (
    Draining,
    Evicted,
    NoWorkers,
    Overloaded,
    PolyphaseError,
    Refused,
    RequestError,
    RoleChanged,
    TransferError,
    WorkerLost,
)
from polyphase.core.ids import RequestId
from polyphase.frontend.failures import lost_for_want_of_room
from polyphase.frontend.flight import Flight
from polyphase.frontend.inbox import End
from polyphase.frontend.metrics import Metrics
from polyphase.frontend.sending import Sending
from polyphase.frontend.terms import Terms
from polyphase.frontend.waiting_room import PROBE_NS, LaneKey, Party, WaitingRoom
from polyphase.router import EvictReason

log = logging.getLogger(__name__)

RETRY_INTERVAL_S = 0.1


@dataclass(frozen=True, slots=True)
class _Stranded:
    flight: Flight
    cause: PolyphaseError  # for which it was broken off or sent back
    tried_ns: int  # when a worker was last looked for


class Waiting:
    """`finish` is the dispatcher's, which ends a flight; it calls `leave`."""

    def __init__(self, sending: Sending, room: WaitingRoom, metrics: Metrics, clock: Clock, finish: Callable[[Flight, End], None]) -> None:
        self._sending = sending
        self._room = room
        self._metrics = metrics
        self._clock = clock
        self._finish = finish
        self._stranded: dict[RequestId, _Stranded] = {}
        self._probed_ns = 0  # when one was last sent on that a worker would rather not have
        self._timer: asyncio.TimerHandle | None = None

    @property
    def stranded(self) -> list[Flight]:
        return [stranded.flight for stranded in self._stranded.values()]

    @property
    def is_watched(self) -> bool:
        """Whether the timer runs."""
        return self._timer is not None

    def admit(self, flights: list[Flight], terms: Terms, now_ns: int) -> None:
        """Send them, or let them wait. Raises: NoWorkers, Overloaded."""
        request = self._sending.request_of(flights[0])
        if not self._room.must_wait(request):
            try:
                self._depart_together(flights)
                self._watch()
                return
            except Overloaded as refusal:  # though none is saturated: each has refused a moment ago, or has its fill of bookings
                log.debug("%s: %s", request.request_id, refusal.message)
        displaced = self._room.enter(flights, request, terms, now_ns)
        if displaced is not None:
            self._evict(displaced, EvictReason.DISPLACED, now_ns)
        self._watch()

    def depart_again(self, flight: Flight, cause: PolyphaseError) -> bool:
        """Send it to a worker; a refusal is waited out. Returns: whether it is, because no worker has room.

        That lasts until the flight must have left, and for one that was promised an answer until its deadline; to wait for a worker to
        join, a while is enough.
        """
        try:
            self._sending.depart(flight)
        except Refused as refusal:
            has_no_worker = isinstance(refusal, NoWorkers)
            flight.avoided.clear()
            # A worker or an engine's peer that was lost may come back, a full one may get room; one that failed would only fail again.
            is_hopeless = has_no_worker and not isinstance(cause, WorkerLost | Draining | RoleChanged | TransferError)
            if is_hopeless or (has_no_worker and self._clock.now_ns() >= flight.waits_until_ns):
                # A worker's own refusal (its queue is full) is the better answer while nothing was sent to the client.
                error = cause if isinstance(cause, Refused | RequestError) else lost_for_want_of_room(cause, refusal)
                self._finish(flight, End(error=error))
                return False
            self._stranded[flight.job.sequence_id] = _Stranded(flight, cause, self._clock.now_ns())
            return not has_no_worker
        self._stranded.pop(flight.job.sequence_id, None)
        return False

    def let_in(self) -> None:
        """Something changed: those who wait may find room now. First the stranded, then the queue, in its order."""
        if not self._stranded and not self._room:
            self._watch()
            return
        skipped: set[LaneKey] = set()  # of workers without room for one that goes first
        for stranded in list(self._stranded.values()):
            self._try_stranded(stranded, skipped)
        while (party := self._room.take(self._clock.now_ns(), skipped)) is not None:
            if not self._send_party(party):
                skipped.add(party.lane.key)
        self._watch()

    def leave(self, flight: Flight, now_ns: int) -> None:
        """It is over. Others of its party go on waiting. Flights that do not wait are ignored."""
        self._room.leave(flight, now_ns)
        self._stranded.pop(flight.job.sequence_id, None)

    def expire(self, flight: Flight, now_ns: int) -> bool:
        """Its deadline has come. Returns: whether it waited in the queue; then it is over."""
        party = flight.party
        if party is None:
            return False
        self._room.leave(flight, now_ns)
        self._evict(replace(party, flights=[flight]), EvictReason.DEADLINE, now_ns)
        return True

    def _try_stranded(self, stranded: _Stranded, skipped: set[LaneKey]) -> None:
        """Send it on if there may be room. If not, those that wait for the same workers wait behind it."""
        flight, cause = stranded.flight, stranded.cause
        if flight.is_over:
            return
        request, now_ns = self._sending.request_of(flight), self._clock.now_ns()
        try:
            key = self._room.key_of(request)
            # Who was refused for want of room waits for headroom, or it would go back and forth with each report.
            is_ready = not isinstance(cause, Overloaded) or self._room.has_headroom(request, now_ns)
        except NoWorkers:
            self.depart_again(flight, cause)
            return
        if not is_ready and now_ns - max(stranded.tried_ns, self._probed_ns) >= PROBE_NS:
            is_ready, self._probed_ns = True, now_ns  # a worker's own answer brings its true load
        must_wait = key in skipped or not is_ready or self.depart_again(flight, cause)
        # What was tried in vain on some workers may wait for the others; the queue need not wait with it.
        if must_wait and not request.excluded:
            skipped.add(key)

    def _depart_together(self, flights: Sequence[Flight]) -> None:
        """Once the first of them is on its way, the others have been promised as much. Raises: NoWorkers, Overloaded; then none is."""
        first, *others = flights
        self._sending.depart(first)
        if others:
            first.leave_by_ns = None
        for flight in others:
            flight.leave_by_ns = None
            self.depart_again(flight, Overloaded("no worker had room for all of its sequences at once"))

    def _send_party(self, party: Party) -> bool:
        now_ns = self._clock.now_ns()
        try:
            self._depart_together(party.flights)
        except Refused as refusal:
            log.debug("%s waits on: %s", party.ticket.request_id, refusal.message)
            self._room.put_back(party, now_ns)
            return False
        cached_tokens = sum(attempt.predicted_cached_tokens(attempt.prompt_leg) for f in party.flights if (attempt := f.record.attempt))
        self._room.note_sent(party, cached_tokens, now_ns)
        return True

    def _evict(self, party: Party, reason: EvictReason, now_ns: int) -> None:
        error = self._room.eviction(party, reason, now_ns)
        for flight in party.flights:
            self._finish(flight, End(error=error))

    def _give_up(self, flight: Flight, cause: PolyphaseError) -> None:
        """A worker sent it back, and until now none had room."""
        self._metrics.evictions.labels(flight.job.model, EvictReason.DEADLINE.value).inc()
        self._finish(flight, End(error=Evicted(f"no worker had room for it in time; {cause.message}", retry_after_s=2)))

    def _tick(self) -> None:
        """From time to time while anything waits."""
        self._timer = None
        now_ns = self._clock.now_ns()
        for party, reason in self._room.turn_out(now_ns):
            self._evict(party, reason, now_ns)
        for stranded in list(self._stranded.values()):
            leave_by_ns = stranded.flight.leave_by_ns
            if leave_by_ns is not None and now_ns >= leave_by_ns:
                self._give_up(stranded.flight, stranded.cause)
        self.let_in()

    def _watch(self) -> None:
        """See to it that the timer runs while anything waits, and only then."""
        is_waiting = bool(self._stranded or self._room)
        if is_waiting and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(RETRY_INTERVAL_S, self._tick)
        elif not is_waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None
