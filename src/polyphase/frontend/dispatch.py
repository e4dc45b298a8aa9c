"""Moves sequences through workers: route, submit, hand over, migrate, end. Everything that changes a flight is here.

                 ┌────────────── broken off: worker lost, or failed in a way that another may not ──────────────┐
                 ▼                                                                                              │
    start ─► WAITING ─ route ─┬─ split ──► PREFILL ── first token and offer ──► SERVING ── finish reason ──► OVER
                 │            └─ whole ───────────────────────────────────────────▲                              ▲
                 └── no worker with room in time · deadline · cancel · error that no other worker would mend ────┘

While all workers are saturated, requests wait in a bounded queue (`waiting_room`), in its order, and are routed when they leave it. Ahead
of the queue wait the *stranded*: what was broken off or handed back, and so has been promised an answer, and what a worker refused.

A worker that is full, busier than it was believed to be, drains, or has taken another role refuses in its first answer: another choice is
made at once, and that is no migration. Nor is it one when a worker hands a sequence back because it was asked to (`ask_to_hand_over`):
its blocks go along.

It is a state machine without tasks: each call (outputs, a worker's loss, a timer, a cancel) moves flights on at once and awaits nothing, so
that a slow client cannot hold up a hand-over. Whatever is booked or leased for a flight is given back when it is over.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from polyphase.core.clock import Clock, MonotonicClock
from polyphase.core.errors import (
    ConnectionLost,
    DeadlineExceeded,
    Draining,
    Evicted,
    NoWorkers,
    Overloaded,
    PolyphaseError,
    Refused,
    RequestError,
    RoleChanged,
    WorkerLost,
)
from polyphase.core.ids import Epoch, RequestId, SequenceHash, WorkerId
from polyphase.frontend.failures import error_of, lost_for_want_of_room
from polyphase.frontend.flight import NEVER, NOBODY, Flight, Job, Stage
from polyphase.frontend.inbox import Arrival, End, Inbox, how_it_ended
from polyphase.frontend.metrics import Metrics
from polyphase.frontend.predictions import Predictions
from polyphase.frontend.records import SequenceRecord
from polyphase.frontend.settings import FrontendSettings
from polyphase.frontend.terms import Terms
from polyphase.frontend.waiting_room import Lane, Party, WaitingRoom
from polyphase.router import EvictReason, Refusals, Route, Router, RouteRequest, believed_tokens, is_refusal
from polyphase.wire.cards import Role
from polyphase.wire.kv import KvOffer, KvPart
from polyphase.wire.requests import Cancel, FinishReason, HandOver, ReleaseLease, SequenceOutput, StepOutputs, ToWorker, WireFailure

log = logging.getLogger(__name__)

RETRY_INTERVAL_S = 0.1
Send = Callable[[str, ToWorker], None]  # raises WorkerLost


class Dispatcher:
    """Used on one event loop. `send` is the request channel's."""

    def __init__(self, router: Router, send: Send, metrics: Metrics, settings: FrontendSettings, clock: Clock | None = None) -> None:
        self._router = router
        self._send = send
        self.metrics = metrics
        self._settings = settings
        self._clock = clock or MonotonicClock()
        self.predictions = Predictions(router, metrics, self._clock)
        self._flights: dict[RequestId, Flight] = {}  # by sequence id
        self._by_wire_id: dict[RequestId, Flight] = {}
        self._epochs: dict[WorkerId, Epoch] = {}
        self._refusals = Refusals()
        self._stranded: dict[RequestId, tuple[Flight, PolyphaseError]] = {}  # with what they were broken off or sent back for
        self.waiting_room = WaitingRoom(router, metrics, settings.admission, settings.migration_patience_s)
        self._tick_timer: asyncio.TimerHandle | None = None  # runs while anything waits

    @property
    def active_count(self) -> int:
        return len(self._flights)

    def now_ns(self) -> int:
        return self._clock.now_ns()

    # What the caller does

    def start(self, jobs: Sequence[Job], inbox: Inbox, terms: Terms | None = None) -> list[Flight]:
        """Send the sequences of one request to workers, or let them wait; what becomes of them arrives in `inbox`, an `End` each.

        Raises: NoWorkers, Overloaded. Then nothing is booked, and nothing arrives.
        Owner: the caller calls `cancel` for each when it wants no more; afterwards nothing arrives.
        """
        now_ns = self._clock.now_ns()
        terms = terms or Terms.usual(self._settings, now_ns)
        flights = [
            Flight(job, inbox, SequenceRecord(now_ns), self.metrics.of(job.model), terms.deadline_ns, terms.leave_by_ns) for job in jobs
        ]
        for flight in flights:
            flight.record.history.note(now_ns, "accepted")
            self._flights[flight.job.sequence_id] = flight
        try:
            self._admit(flights, terms, now_ns)
        except Refused as refusal:
            for flight in flights:
                self._close(flight, f"refused: {refusal.message}")
            raise
        loop = asyncio.get_running_loop()
        for flight in flights:
            flight.deadline = loop.call_later(max(terms.deadline_ns - now_ns, 0) / 1e9, self._expire, flight)
        return flights

    def cancel(self, flight: Flight) -> None:
        """Stop it wherever it is, and give back what it holds. Idempotent; after its end nothing happens."""
        if not flight.is_over:
            self._tell_worker_to_stop(flight)
            self._close(flight)
            self._let_in()

    def fail_all(self, error: PolyphaseError) -> None:
        """End every flight with this error; for a frontend that must go now."""
        for flight in list(self._flights.values()):
            self._tell_worker_to_stop(flight)
            self._finish(flight, End(error=error))
        self._watch()

    # What happens elsewhere

    def worker_joined(self, worker_id: WorkerId, epoch: Epoch) -> None:
        self._epochs[worker_id] = epoch
        self._refusals.forget(worker_id)
        self._let_in()

    def worker_reported(self, worker_id: WorkerId) -> None:
        """Its load is known again: if it refused before, the router judges anew."""
        self._refusals.forget(worker_id)
        self._let_in()

    def worker_lost(self, worker_id: WorkerId, epoch: Epoch) -> None:
        """This life of the worker is over: what it had goes on elsewhere."""
        if self._epochs.get(worker_id) == epoch:
            del self._epochs[worker_id]
        for flight in list(self._flights.values()):
            if flight.worker_id == worker_id and flight.epoch == epoch:
                self._break_off(flight, WorkerLost(f"worker {worker_id} was lost while it served the request"))
        self._let_in()

    def connection_lost(self, worker_id: WorkerId, epoch: Epoch) -> None:
        """Nobody knows which words between here and this worker were lost: what it had begins anew, at whichever worker."""
        for flight in self._at(worker_id, epoch):
            self._break_off(flight, ConnectionLost(f"the connection to worker {worker_id} broke"))

    def ask_to_hand_over(self, worker_id: WorkerId, epoch: Epoch, stages: Collection[Stage]) -> int:
        """Ask this worker for the sequences there that are in one of these stages; each goes on elsewhere once it is handed over.

        Returns: how many were asked for now; none is asked for twice.
        """
        asked_count = 0
        for flight in self._at(worker_id, epoch):
            if flight.stage in stages and not flight.is_leaving and self._try_send(worker_id, HandOver(flight.wire_id)):
                flight.is_leaving = True
                asked_count += 1
        return asked_count

    def worker_stalled(self, worker_id: WorkerId, epoch: Epoch, reason: str) -> int:
        """What is there goes on elsewhere, if it may migrate once more; otherwise it may as well wait there. Returns: how many went."""
        leaving = [flight for flight in self._at(worker_id, epoch) if flight.record.migrations < self._settings.migration_limit]
        for flight in leaving:
            self._tell_worker_to_stop(flight)  # it may come round
            self._break_off(flight, WorkerLost(f"worker {worker_id} stands still: {reason}"))
        return len(leaving)

    def _at(self, worker_id: WorkerId, epoch: Epoch) -> list[Flight]:
        return [
            flight
            for flight in self._flights.values()
            if flight.worker_id == worker_id and flight.epoch == epoch and flight.stage in (Stage.PREFILL, Stage.SERVING)
        ]

    def on_outputs(self, outputs: StepOutputs) -> None:
        now_ns = self._clock.now_ns()
        for output in outputs.outputs:
            flight = self._by_wire_id.get(RequestId(output.request_id))
            if flight is not None and flight.worker_id == outputs.worker_id and flight.epoch == outputs.epoch:
                self._on_output(flight, output, now_ns)
        self._let_in()

    # Waiting

    def _admit(self, flights: list[Flight], terms: Terms, now_ns: int) -> None:
        """Send them, or let them wait. Raises: NoWorkers, Overloaded."""
        request = self._request_of(flights[0])
        if not self.waiting_room.must_wait(request):
            try:
                self._depart_together(flights)
                self._watch()
                return
            except Overloaded as refusal:  # though none is saturated: each has refused a moment ago, or has its fill of bookings
                log.debug("%s: %s", request.request_id, refusal.message)
        displaced = self.waiting_room.enter(flights, request, terms, now_ns)
        if displaced is not None:
            self._evict(displaced, EvictReason.DISPLACED, now_ns)
        self._watch()

    def _depart_together(self, flights: Sequence[Flight]) -> None:
        """Once the first of them is on its way, the others have been promised as much. Raises: NoWorkers, Overloaded; then none is."""
        first, *others = flights
        self._depart(first)
        if others:
            first.leave_by_ns = None
        for flight in others:
            flight.leave_by_ns = None
            self._depart_again(flight, Overloaded("no worker had room for all of its sequences at once"))

    def _let_in(self) -> None:
        """Something changed: those who wait may find room now. First the stranded, then the queue, in its order."""
        if not self._stranded and not self.waiting_room:
            self._watch()
            return
        held: set[str] = set()  # models without room for one that goes first
        for flight, cause in list(self._stranded.values()):
            if flight.job.model not in held and not flight.is_over:
                is_stranded = self._depart_again(flight, cause)
                # What was tried in vain on some workers may wait for the others; the queue need not wait with it.
                if is_stranded and not (flight.tried or flight.avoided):
                    held.add(flight.job.model)
        skipped: set[Lane] = set()
        while (party := self.waiting_room.take(self._clock.now_ns(), skipped, held)) is not None:
            if not self._send_party(party):
                skipped.add(party.lane)
        self._watch()

    def _send_party(self, party: Party) -> bool:
        now_ns = self._clock.now_ns()
        try:
            self._depart_together(party.flights)
        except Refused as refusal:
            log.debug("%s waits on: %s", party.ticket.request_id, refusal.message)
            self.waiting_room.put_back(party, now_ns)
            return False
        cached_tokens = sum(attempt.predicted_cached_tokens(attempt.prompt_leg) for f in party.flights if (attempt := f.record.attempt))
        self.waiting_room.note_sent(party, cached_tokens, now_ns)
        return True

    def _evict(self, party: Party, reason: EvictReason, now_ns: int) -> None:
        error = self.waiting_room.eviction(party, reason, now_ns)
        for flight in party.flights:
            self._finish(flight, End(error=error))

    def _tick(self) -> None:
        """From time to time while anything waits."""
        self._tick_timer = None
        now_ns = self._clock.now_ns()
        for party, reason in self.waiting_room.turn_out(now_ns):
            self._evict(party, reason, now_ns)
        for flight, cause in list(self._stranded.values()):
            if flight.leave_by_ns is not None and now_ns >= flight.leave_by_ns:
                self._give_up(flight, cause)
        self._let_in()

    def _watch(self) -> None:
        """See to it that the timer runs while anything waits, and only then."""
        is_waiting = bool(self._stranded or self.waiting_room)
        if is_waiting and self._tick_timer is None:
            self._tick_timer = asyncio.get_running_loop().call_later(RETRY_INTERVAL_S, self._tick)
        elif not is_waiting and self._tick_timer is not None:
            self._tick_timer.cancel()
            self._tick_timer = None

    def _give_up(self, flight: Flight, cause: PolyphaseError) -> None:
        """A worker sent it back, and until now none had room."""
        self.metrics.evictions.labels(flight.job.model, EvictReason.DEADLINE.value).inc()
        self._finish(flight, End(error=Evicted(f"no worker had room for it in time; {cause.message}", retry_after_s=2)))

    # Transitions

    def _depart(self, flight: Flight) -> None:
        """Route and submit; tries one worker after the other until one takes the message. Raises: NoWorkers, Overloaded."""
        job = flight.job
        hashes = flight.hashes()
        while True:
            flight.worker_id, flight.epoch = NOBODY, NEVER  # so that nothing that becomes of the last one concerns it
            started = time.perf_counter()
            request = self._request_of(flight, hashes)
            route = self._refusals.route(self._router.route, request, self._clock.now_ns())
            self.metrics.decision_s.observe(time.perf_counter() - started)
            flight.route = route
            self._rename(flight)
            offer = self._usable_offer(flight)
            # Where blocks wait to be taken, no second prefill is wanted.
            splits = route.prefill is not None and offer is None
            place = route.prefill if splits and route.prefill else route.decode
            if route.prefill is not None and not splits:
                self._router.mark_prefill_done(job.sequence_id)
            flight.worker_id, flight.epoch = place.worker_id, place.epoch
            flight.roles = self._roles_in(route)
            now_ns = self._clock.now_ns()
            flight.note_route(route, now_ns, is_split=splits)
            flight.predict(route, now_ns, self.predictions.removed_block_count)
            try:
                believed = believed_tokens(place, flight.attempts)
                has_flow = splits and self._settings.kv_flow
                submit = flight.submit(now_ns, hand_over=splits, with_parts=has_flow, offer=offer, believed_prefill_tokens=believed)
                self._send(place.worker_id, submit)
            except WorkerLost as error:
                log.warning("%s: %s", flight.wire_id, error.message)
                flight.note_break(now_ns, error.message)
                flight.tried.add((place.worker_id, place.epoch))
                continue
            if flight.record.queued_ns and not flight.record.admitted_ns:
                flight.record.admitted_ns = now_ns
                waited_s = (now_ns - flight.record.queued_ns) / 1e9
                flight.record.history.note(now_ns, "admitted", detail=f"a worker had room after {waited_s:.2f} s")
            flight.record.history.note(now_ns, "sent", place.worker_id, "to compute the prompt" if splits else "to serve it")
            flight.stage = Stage.PREFILL if splits else Stage.SERVING
            self.metrics.routes.labels(job.model, "split" if splits else "whole").inc()
            return

    def _on_output(self, flight: Flight, output: SequenceOutput, now_ns: int) -> None:
        if output.part is not None:
            self._pass_on(flight, output.part)
        if output.stats is not None:
            flight.note_stats(output.stats, now_ns)
            prediction = flight.predictions.pop(flight.worker_id, None)
            if prediction is not None:
                self.predictions.note_report(prediction, output.stats.cached_token_count)
        failed = output.finish_reason in (FinishReason.ERROR, FinishReason.CANCELLED)
        if flight.stage is Stage.SERVING and not failed:
            flight.offer = None  # its reader has it, and releases it by itself
        if output.failure is not None and output.failure.is_retryable and is_refusal(output.failure.code):
            self._turn_away(flight, output.failure, now_ns)
            return
        end: End | None = None
        error: PolyphaseError | None = None
        if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            end = End(output.finish_reason, output.stop_reason)
        elif output.finish_reason is FinishReason.ERROR:
            error = error_of(output.failure)
            if output.failure is None or not output.failure.is_retryable:
                end = End(error=error)
        elif output.finish_reason is FinishReason.CANCELLED:
            error = WorkerLost(f"worker {flight.worker_id} gave the request up")
        if output.token_ids or end is not None:
            self._take_tokens(flight, output, now_ns, end)
        if end is not None:
            self._close(flight, how_it_ended(end))
        elif error is not None:
            self._break_off(flight, error)
        elif output.finish_reason is FinishReason.HANDED_OVER:
            if flight.stage is Stage.PREFILL and output.token_ids:
                self._hand_over(flight, output.offer, now_ns)
            else:
                self._move(flight, output.offer, now_ns)

    def _pass_on(self, flight: Flight, part: KvPart) -> None:
        """Blocks of a prompt that is still being computed: the decode worker that was chosen may pull them already."""
        if flight.stage is Stage.PREFILL and flight.route is not None:
            place = flight.route.decode
            if self._epochs.get(place.worker_id) == place.epoch:
                self._try_send(place.worker_id, flight.pull_ahead(part))

    def _take_tokens(self, flight: Flight, output: SequenceOutput, now_ns: int, end: End | None) -> None:
        count = len(output.token_ids)
        if count:
            if not flight.emitted:
                self._router.mark_prefill_done(flight.job.sequence_id)
                flight.metrics.ttft_s.observe((now_ns - flight.record.started_ns) / 1e9)
                flight.record.history.note(now_ns, "first token", flight.worker_id)
            gap_ms = flight.record.note_tokens(count, now_ns)
            if gap_ms is not None:
                flight.metrics.itl_s.observe(gap_ms / 1e3)
            flight.emitted += output.token_ids
            flight.avoided.clear()
            flight.waits_until_ns = 0
        flight.inbox.put(Arrival(flight.job.index, output.token_ids, output.logprobs or [], end))

    def _hand_over(self, flight: Flight, offer: KvOffer | None, now_ns: int) -> None:
        """Prefill is done: on to the decode worker that was chosen with it, or to another if that is gone."""
        flight.offer = offer
        assert flight.route is not None
        self._router.mark_prefill_done(flight.job.sequence_id)
        place = flight.route.decode
        if self._epochs.get(place.worker_id) == place.epoch:
            if not self._is_as_chosen(flight, place.worker_id):
                self._move(flight, offer, now_ns)
                return
            flight.worker_id, flight.epoch, flight.stage = place.worker_id, place.epoch, Stage.SERVING
            flight.is_leaving = False
            try:
                self._send(place.worker_id, flight.submit(now_ns, offer=offer))
            except WorkerLost as error:
                self._break_off(flight, error)
                return
            flight.record.history.note(now_ns, "handed over", place.worker_id)
            return
        flight.worker_id, flight.epoch = place.worker_id, place.epoch
        self._break_off(flight, WorkerLost(f"worker {place.worker_id} was lost before it could take the request over"))

    def _move(self, flight: Flight, offer: KvOffer | None, now_ns: int) -> None:
        """Its worker has handed it back, unfinished and unharmed: on to another one, which may take what was computed."""
        what = f"with {offer.token_count} tokens of KV" if offer is not None else "with nothing computed"
        log.info("%s: leaves worker %s after %d tokens, %s", flight.wire_id, flight.worker_id, len(flight.emitted), what)
        flight.record.history.note(now_ns, "moved", flight.worker_id, what)
        flight.cause = self._why_moved(flight)
        flight.record.moves += 1
        flight.metrics.moves.inc()
        flight.offer = offer
        flight.stage = Stage.WAITING
        flight.leave_by_ns = None
        flight.waits_until_ns = now_ns + int(self._settings.move_patience_s * 1e9)
        self._depart_again(flight, WorkerLost(f"worker {flight.worker_id} had to hand the request over"))

    def _why_moved(self, flight: Flight) -> str:
        facts = self._router.facts_of(flight.worker_id)
        if facts is not None and facts.role is not flight.roles.get(flight.worker_id):
            return f"worker {flight.worker_id} is a {facts.role} worker now"
        return f"worker {flight.worker_id} drains" if facts is None or facts.is_draining else f"worker {flight.worker_id} handed it back"

    def _break_off(self, flight: Flight, cause: PolyphaseError) -> None:
        """The worker that had it will not finish it; another one goes on from the tokens that are there."""
        if isinstance(cause, ConnectionLost):
            flight.avoided.add(flight.worker_id)  # another is surer, but if there is none, this one may be well
        else:
            flight.tried.add((flight.worker_id, flight.epoch))
        flight.note_break(self._clock.now_ns(), cause.message)
        if flight.remaining_tokens <= 0:  # all is there but the word that it ended
            self._finish(flight, End(FinishReason.LENGTH))
            return
        if flight.record.migrations >= self._settings.migration_limit:
            log.warning("%s: given up after %d migrations: %s", flight.wire_id, self._settings.migration_limit, cause.message)
            self._finish(flight, End(error=cause))
            return
        log.info("%s: goes on elsewhere after %d tokens: %s", flight.wire_id, len(flight.emitted), cause.message)
        flight.record.migrations += 1
        flight.metrics.migrations.inc()
        flight.stage = Stage.WAITING
        flight.leave_by_ns = None
        flight.waits_until_ns = self._clock.now_ns() + int(self._settings.migration_patience_s * 1e9)
        self._depart_again(flight, cause)

    def _turn_away(self, flight: Flight, failure: WireFailure, now_ns: int) -> None:
        """The worker cannot take it now: no fault, and no migration. With what the refusal says, another choice is made at once."""
        worker_id = flight.worker_id
        flight.record.history.note(now_ns, "refused", worker_id, failure.message)
        self.metrics.refusals.labels(worker_id).inc()
        self._refusals.note(worker_id, failure.code, now_ns)
        if failure.code == Draining.code:
            flight.tried.add((worker_id, flight.epoch))
        elif failure.code == RoleChanged.code:
            flight.avoided.add(worker_id)  # until the registry's news is here, which is a matter of milliseconds
        if failure.load is not None:
            self._router.report_load(worker_id, flight.epoch, failure.load)
        flight.stage = Stage.WAITING
        if not flight.waits_until_ns:
            flight.waits_until_ns = now_ns + int(self._settings.migration_patience_s * 1e9)
        self._depart_again(flight, error_of(failure))

    def _depart_again(self, flight: Flight, cause: PolyphaseError) -> bool:
        """As `_depart`, but a refusal is waited out. Returns: whether it is, because no worker has room.

        That lasts until the flight must have left, and for one that was promised an answer until its deadline; to wait for a worker to
        join, a while is enough.
        """
        try:
            self._depart(flight)
        except Refused as refusal:
            has_no_worker = isinstance(refusal, NoWorkers)
            flight.avoided.clear()
            # A worker that was lost may come back, and a full one may get room; one that failed would only fail again.
            is_hopeless = has_no_worker and not isinstance(cause, WorkerLost | Draining | RoleChanged)
            if is_hopeless or (has_no_worker and self._clock.now_ns() >= flight.waits_until_ns):
                # A worker's own refusal (its queue is full) is the better answer while nothing was sent to the client.
                error = cause if isinstance(cause, Refused | RequestError) else lost_for_want_of_room(cause, refusal)
                self._finish(flight, End(error=error))
                return False
            self._stranded[flight.job.sequence_id] = (flight, cause)
            return not has_no_worker
        self._stranded.pop(flight.job.sequence_id, None)
        return False

    def _expire(self, flight: Flight) -> None:
        now_ns = self._clock.now_ns()
        if flight.party is not None:
            party = flight.party
            self.waiting_room.leave(flight, now_ns)
            self._evict(replace(party, flights=[flight]), EvictReason.DEADLINE, now_ns)
        else:
            self._tell_worker_to_stop(flight)
            seconds = (flight.deadline_ns - flight.record.started_ns) / 1e9
            self._finish(flight, End(error=DeadlineExceeded(f"the request was not finished within {seconds:g} s")))
        self._let_in()

    def _finish(self, flight: Flight, end: End) -> None:
        flight.inbox.put(Arrival(flight.job.index, end=end))
        self._close(flight, how_it_ended(end))

    def _close(self, flight: Flight, how: str = "cancelled") -> None:
        """It is over: booking, blocks that nobody took, names and timers go."""
        flight.stage = Stage.OVER
        self.waiting_room.leave(flight, self._clock.now_ns())
        self._stranded.pop(flight.job.sequence_id, None)
        self._release_offer(flight)
        flight.record.ended_ns = self._clock.now_ns()
        flight.record.history.note(flight.record.ended_ns, "ended", detail=how)
        self._router.release(flight.job.sequence_id)
        self._flights.pop(flight.job.sequence_id, None)
        self._by_wire_id.pop(flight.wire_id, None)
        if flight.deadline is not None:
            flight.deadline.cancel()
            flight.deadline = None

    # Odds and ends

    def _request_of(self, flight: Flight, hashes: list[SequenceHash] | None = None) -> RouteRequest:
        job = flight.job
        return RouteRequest(
            request_id=job.sequence_id,
            model=job.model,
            sequence_hashes=flight.hashes() if hashes is None else hashes,
            prompt_token_count=len(job.prompt_ids) + len(flight.emitted),
            max_output_tokens=flight.remaining_tokens,
            excluded=frozenset(worker for worker, epoch in flight.tried if self._epochs.get(worker) == epoch) | flight.avoided,
            now_ns=self._clock.now_ns(),
            session=job.hints.session,
            preferred_labels=job.hints.preferred_labels,
            required_labels=job.hints.required_labels,
        )

    def _roles_in(self, route: Route) -> dict[WorkerId, Role]:
        places = [place.worker_id for place in (route.prefill, route.decode) if place is not None]
        return {worker_id: facts.role for worker_id in places if (facts := self._router.facts_of(worker_id)) is not None}

    def _is_as_chosen(self, flight: Flight, worker_id: WorkerId) -> bool:
        """Whether the worker still is what it was when the route was chosen."""
        facts = self._router.facts_of(worker_id)
        return facts is not None and not (facts.is_draining or facts.is_stalled) and facts.role is flight.roles.get(worker_id)

    def _rename(self, flight: Flight) -> None:
        flight.is_leaving = False
        self._by_wire_id.pop(flight.wire_id, None)
        flight.attempts += 1
        suffix = f".{flight.attempts}" if flight.attempts > 1 else ""
        flight.wire_id = RequestId(f"{flight.job.sequence_id}{suffix}")
        self._by_wire_id[flight.wire_id] = flight

    def _usable_offer(self, flight: Flight) -> KvOffer | None:
        """The offer that is still open, if its owner lives and keeps it. Another's is given back."""
        offer = flight.offer
        if offer is None:
            return None
        if self._epochs.get(WorkerId(offer.worker_id)) == offer.epoch and self._clock.now_ns() < offer.expires_at_ns:
            return offer
        flight.offer = None
        return None

    def _tell_worker_to_stop(self, flight: Flight) -> None:
        if flight.stage in (Stage.PREFILL, Stage.SERVING):
            self._try_send(flight.worker_id, Cancel(flight.wire_id))

    def _release_offer(self, flight: Flight) -> None:
        """Nobody will read these blocks. (If somebody is at it just now, their generation tells it that they changed.)"""
        offer, flight.offer = flight.offer, None
        if offer is not None:
            self._try_send(offer.worker_id, ReleaseLease(offer.lease_id))

    def _try_send(self, worker_id: str, message: ToWorker) -> bool:
        try:
            self._send(worker_id, message)
        except WorkerLost as error:
            log.debug("not sent: %s", error.message)
            return False
        return True
