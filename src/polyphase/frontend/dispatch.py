"""Moves sequences through workers: route, submit, hand over, migrate, end.

                 ┌────────────── broken off: worker lost, or failed in a way that another may not ──────────────┐
                 ▼                                                                                              │
    start ─► WAITING ─ route ─┬─ split ──► PREFILL ─ first token and/or offer ► SERVING ── finish reason ──► OVER
                 │            └─ whole ───────────────────────────────────────────▲                              ▲
                 └── no worker with room in time · deadline · cancel · error that no other worker would mend ────┘

These are the transitions. What router and workers are told is in `sending`, and who waits, in the queue or ahead of it, in `waiting`;
nothing else changes a flight.

What is passed through (`passing`) goes the same way, whole, up to the first piece of its answer: from then on nobody else can finish it.

A worker that is full, busier than it was believed to be, drains, or has taken another role refuses in its first answer: another choice is
made at once, and that is no migration. Nor is it one when a worker hands a sequence back because it was asked to (`ask_to_hand_over`):
its blocks go along.

It is a state machine without tasks: each call (outputs, a worker's loss, a timer, a cancel) moves flights on at once and awaits nothing, so
that a slow client cannot hold up a hand-over. Whatever is booked or leased for a flight is given back when it is over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence

from polyphase.core.clock import Clock, MonotonicClock
from polyphase.core.errors import (
    ConnectionLost,
    DeadlineExceeded,
    Draining,
    PolyphaseError,
    Refused,
    RoleChanged,
    TransferError,
    WorkerLost,
)
from polyphase.core.ids import Epoch, RequestId, WorkerId
from polyphase.frontend.failures import error_of
from polyphase.frontend.flight import Flight, Job, Stage
from polyphase.frontend.inbox import Arrival, End, Inbox, how_it_ended
from polyphase.frontend.metrics import Metrics
from polyphase.frontend.predictions import Predictions
from polyphase.frontend.records import SequenceRecord
from polyphase.frontend.sending import Send, Sending
from polyphase.frontend.settings import FrontendSettings
from polyphase.frontend.terms import Terms
from polyphase.frontend.waiting import Waiting
from polyphase.frontend.waiting_room import WaitingRoom
from polyphase.router import Router, is_refusal
from polyphase.wire.kv import EngineOffer, Offer
from polyphase.wire.requests import FinishReason, Passed, PhaseStats, SequenceOutput, StepOutputs, WireFailure

log = logging.getLogger(__name__)


class Dispatcher:
    """Used on one event loop. `send` is the request channel's."""

    def __init__(self, router: Router, send: Send, metrics: Metrics, settings: FrontendSettings, clock: Clock | None = None) -> None:
        self._router = router
        self.metrics = metrics
        self._settings = settings
        self._clock = clock or MonotonicClock()
        self.predictions = Predictions(router, metrics, self._clock)
        self._sending = Sending(router, send, metrics, self.predictions, self._clock, has_kv_flow=settings.kv_flow)
        self.waiting_room = WaitingRoom(router, self._sending.refusals, metrics, settings.admission, settings.migration_patience_s)
        self._waiting = Waiting(self._sending, self.waiting_room, metrics, self._clock, self._finish)
        self._flights: dict[RequestId, Flight] = {}  # by sequence id

    @property
    def active_count(self) -> int:
        return len(self._flights)

    def now_ns(self) -> int:
        return self._clock.now_ns()

    def takes_grammars(self, model: str) -> bool:
        """Whether a worker of the model has structured output."""
        return any(facts.takes_grammars for facts in self._router.facts() if facts.model == model)

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
            self._waiting.admit(flights, terms, now_ns)
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
            self._sending.call_off(flight)
            self._close(flight)
            self._waiting.let_in()

    def read_on(self, flight: Flight, byte_count: int) -> None:
        """The client has read so much of what was passed to it: more may come."""
        if not flight.is_over:
            self._sending.read_on(flight, byte_count)

    def fail_all(self, error: PolyphaseError) -> None:
        """End every flight with this error; for a frontend that must go now."""
        for flight in list(self._flights.values()):
            self._sending.call_off(flight)
            self._finish(flight, End(error=error))
        self._waiting.let_in()

    # What happens elsewhere

    def worker_joined(self, worker_id: WorkerId, epoch: Epoch, endpoint: str | None = None) -> None:
        """`endpoint`: where other workers reach it; None: they cannot."""
        self._sending.joined(worker_id, epoch, endpoint)
        self._waiting.let_in()

    def worker_reported(self, worker_id: WorkerId) -> None:
        """Its load is known again: if it refused before, the router judges anew."""
        self._sending.refusals.forget(worker_id)
        self._waiting.let_in()

    def worker_lost(self, worker_id: WorkerId, epoch: Epoch) -> None:
        """This life of the worker is over: what it had goes on elsewhere."""
        self._sending.left(worker_id, epoch)
        for flight in list(self._flights.values()):
            if flight.cut_from == (worker_id, epoch):
                flight.cut_from = None
                flight.failure_count += 1
            if flight.worker_id == worker_id and flight.epoch == epoch:
                self._break_off(flight, WorkerLost(f"worker {worker_id} was lost while it served the request"))
        self._waiting.let_in()

    def connection_lost(self, worker_id: WorkerId, epoch: Epoch) -> None:
        """Nobody knows which words between here and this worker were lost: what it had begins anew, at whichever worker."""
        self._sending.say_again(worker_id)
        for flight in self._at(worker_id, epoch):
            self._sending.call_off(flight)  # it may have been handed over, with a lease that we never heard of
            self._break_off(flight, ConnectionLost(f"the connection to worker {worker_id} broke"))
        self._waiting.let_in()

    def ask_to_hand_over(self, worker_id: WorkerId, epoch: Epoch, stages: Collection[Stage]) -> int:
        """Ask this worker for the sequences there that are in one of these stages; each goes on elsewhere once it is handed over.

        Returns: how many were asked for now; none is asked for twice.
        """
        asked_count = 0
        for flight in self._at(worker_id, epoch):
            if flight.stage in stages and not flight.is_leaving and self._can_move(flight) and self._sending.ask_back(flight):
                asked_count += 1
        return asked_count

    def worker_stalled(self, worker_id: WorkerId, epoch: Epoch, reason: str) -> int:
        """What is there goes on elsewhere, if it may migrate once more; otherwise it may as well wait there. Returns: how many went."""
        limit = self._settings.migration_limit
        leaving = [flight for flight in self._at(worker_id, epoch) if flight.failure_count < limit and self._can_move(flight)]
        for flight in leaving:
            self._sending.call_off(flight)  # it may come round
            flight.avoided.add(worker_id)  # and then, if there is no other, go on with it after all
            self._break_off(flight, WorkerLost(f"worker {worker_id} stands still: {reason}"))
        self._waiting.let_in()
        return len(leaving)

    def _can_move(self, flight: Flight) -> bool:
        """Whether another could go on with it: what follows a grammar finds few that can, and a passed answer nobody."""
        if flight.has_answered:
            return False
        if flight.job.grammar is None or not flight.emitted:
            return True
        others = [facts for facts in self._router.facts() if facts.model == flight.job.model and facts.worker_id != flight.worker_id]
        return any(facts.resumes_grammars for facts in others)

    def _at(self, worker_id: WorkerId, epoch: Epoch) -> list[Flight]:
        return [
            flight
            for flight in self._flights.values()
            if flight.worker_id == worker_id and flight.epoch == epoch and flight.stage in (Stage.PREFILL, Stage.SERVING)
        ]

    def on_outputs(self, outputs: StepOutputs) -> None:
        now_ns = self._clock.now_ns()
        for output in outputs.outputs:
            flight = self._sending.flight_of(output.request_id, outputs.worker_id, outputs.epoch)
            if flight is not None:
                self._on_output(flight, output, now_ns)
        self._waiting.let_in()

    # Transitions

    def _on_output(self, flight: Flight, output: SequenceOutput, now_ns: int) -> None:
        if output.part is not None:
            self._sending.pass_on(flight, output.part)
        if not flight.answered_ns and (output.token_ids or output.stats is not None or output.finish_reason is not None):
            flight.answered_ns = now_ns
        if output.stats is not None:
            self._router.mark_prefill_done(flight.job.sequence_id)  # also of what was taken up with tokens already emitted
            flight.note_stats(output.stats, now_ns)
            self._note_pace(flight, output.stats, now_ns)
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
        if output.passed is not None:
            self._take_passed(flight, output.passed, now_ns)
        if output.token_ids or end is not None:
            self._take_tokens(flight, output, now_ns, end)
        if end is not None:
            self._close(flight, how_it_ended(end))
        elif error is not None:
            self._break_off(flight, error)
        elif output.finish_reason is FinishReason.HANDED_OVER:
            if flight.stage is Stage.PREFILL and (output.token_ids or isinstance(output.offer, EngineOffer)):
                self._hand_over(flight, output.offer, now_ns)
            else:
                self._move(flight, output.offer, now_ns)

    def _note_pace(self, flight: Flight, stats: PhaseStats, now_ns: int) -> None:
        """What the first token at this worker says of its pace, and of the way of its blocks; also if the stats came with the last."""
        took_ms = (flight.answered_ns - flight.sent_ns) / 1e6 - stats.queue_ms
        moved = stats.transferred_token_count
        if not moved or flight.holder is not None:
            uncached = len(flight.job.prompt_ids) + len(flight.emitted) - stats.cached_token_count - moved
            self._router.paces.note_prefill(flight.worker_id, uncached, took_ms - stats.transfer_ms)
            if flight.holder is not None:
                self._router.paces.note_pull(flight.holder, flight.worker_id, moved, stats.transfer_ms, now_ns)
                flight.metrics.note_pull(moved)
                flight.holder = None
        elif flight.offer is not None:
            source = WorkerId(flight.offer.worker_id)
            self._router.paces.note_transfer(source, flight.worker_id, moved, stats.transfer_ms, took_ms - stats.transfer_ms)

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

    def _take_passed(self, flight: Flight, passed: Passed, now_ns: int) -> None:
        if not flight.has_answered:
            flight.has_answered = True
            self._router.mark_prefill_done(flight.job.sequence_id)
            flight.record.first_token_ns = now_ns
            flight.metrics.ttft_s.observe((now_ns - flight.record.started_ns) / 1e9)
            flight.record.history.note(now_ns, "first answer", flight.worker_id)
        flight.inbox.put(Arrival(flight.job.index, passed=passed))

    def _hand_over(self, flight: Flight, offer: Offer | None, now_ns: int) -> None:
        """Prefill is done: on to the decode worker that was chosen with it, or to another if that is gone."""
        flight.offer = offer
        assert flight.route is not None
        self._router.mark_prefill_done(flight.job.sequence_id)
        place = flight.route.decode
        if not self._sending.lives(place.worker_id, place.epoch):
            flight.worker_id, flight.epoch = place.worker_id, place.epoch
            self._break_off(flight, WorkerLost(f"worker {place.worker_id} was lost before it could take the request over"))
        elif not self._sending.is_as_chosen(flight, place.worker_id):
            self._move(flight, offer, now_ns)
        else:
            try:
                self._sending.hand_over(flight, offer, now_ns)
            except WorkerLost as error:
                self._break_off(flight, error)

    def _move(self, flight: Flight, offer: Offer | None, now_ns: int) -> None:
        """Its worker has handed it back, unfinished and unharmed: on to another one, which may take what was computed."""
        what = f"with {offer.token_count} tokens of KV" if offer is not None else "with nothing computed"
        log.info("%s: leaves worker %s after %d tokens, %s", flight.wire_id, flight.worker_id, len(flight.emitted), what)
        flight.set_back(now_ns, "moved", self._why_moved(flight), what)
        flight.record.moves += 1
        flight.metrics.moves.inc()
        flight.offer = offer
        flight.stage = Stage.WAITING
        flight.leave_by_ns = None
        flight.waits_until_ns = now_ns + int(self._settings.move_patience_s * 1e9)
        self._waiting.depart_again(flight, WorkerLost(f"worker {flight.worker_id} had to hand the request over"))

    def _why_moved(self, flight: Flight) -> str:
        facts = self._router.facts_of(flight.worker_id)
        if facts is not None and facts.role is not flight.roles.get(flight.worker_id):
            return f"worker {flight.worker_id} is a {facts.role} worker now"
        if facts is not None and facts.is_asleep:
            return f"worker {flight.worker_id} falls asleep"
        return f"worker {flight.worker_id} drains" if facts is None or facts.is_draining else f"worker {flight.worker_id} handed it back"

    def _break_off(self, flight: Flight, cause: PolyphaseError) -> None:
        """The worker that had it will not finish it; another one goes on from the tokens that are there."""
        if flight.stage is Stage.SERVING and isinstance(flight.offer, EngineOffer):
            self._sending.release_offer(flight)  # that worker may have begun to fetch it
        if isinstance(cause, ConnectionLost | TransferError):  # an engine whose peer was lost has done nothing wrong
            flight.avoided.add(flight.worker_id)  # another is surer, but if there is none, this one may be well
        elif flight.worker_id not in flight.avoided:
            flight.tried.add((flight.worker_id, flight.epoch))
        flight.note_break(self._clock.now_ns(), cause.message)
        if flight.has_answered:
            log.warning("%s: broken off in the middle of an answer that no other worker can go on with: %s", flight.wire_id, cause.message)
            self._finish(flight, End(error=cause))
            return
        if flight.remaining_tokens <= 0:  # all is there but the word that it ended
            self._finish(flight, End(FinishReason.LENGTH))
            return
        if isinstance(cause, ConnectionLost):  # no fault of the request's, unless it turns out that the worker died
            flight.cut_from = (flight.worker_id, flight.epoch)
        elif flight.failure_count >= self._settings.migration_limit:
            log.warning("%s: given up, since %d workers failed it before: %s", flight.wire_id, flight.failure_count, cause.message)
            self._finish(flight, End(error=cause))
            return
        else:
            flight.failure_count += 1
        log.info("%s: goes on elsewhere after %d tokens: %s", flight.wire_id, len(flight.emitted), cause.message)
        flight.record.migrations += 1
        flight.metrics.migrations.inc()
        flight.stage = Stage.WAITING
        flight.leave_by_ns = None
        flight.waits_until_ns = self._clock.now_ns() + int(self._settings.migration_patience_s * 1e9)
        self._waiting.depart_again(flight, cause)

    def _turn_away(self, flight: Flight, failure: WireFailure, now_ns: int) -> None:
        """The worker cannot take it now: no fault, and no migration. With what the refusal says, another choice is made at once."""
        worker_id = flight.worker_id
        flight.set_back(now_ns, "refused", failure.message)
        flight.record.refusals += 1
        self.metrics.refusals.labels(worker_id).inc()
        self._sending.refusals.note(worker_id, failure.code, now_ns)
        if failure.code == Draining.code:
            flight.tried.add((worker_id, flight.epoch))
        elif failure.code == RoleChanged.code:
            flight.avoided.add(worker_id)  # until the registry's news is here, which is a matter of milliseconds
        if failure.load is not None:
            self._router.report_load(worker_id, flight.epoch, failure.load)
        flight.stage = Stage.WAITING
        if not flight.waits_until_ns:
            flight.waits_until_ns = now_ns + int(self._settings.migration_patience_s * 1e9)
        self._waiting.depart_again(flight, error_of(failure))

    def _expire(self, flight: Flight) -> None:
        now_ns = self._clock.now_ns()
        if not self._waiting.expire(flight, now_ns):
            self._sending.call_off(flight)
            seconds = (flight.deadline_ns - flight.record.started_ns) / 1e9
            self._finish(flight, End(error=DeadlineExceeded(f"the request was not finished within {seconds:g} s")))
        self._waiting.let_in()

    def _finish(self, flight: Flight, end: End) -> None:
        flight.inbox.put(Arrival(flight.job.index, end=end))
        self._close(flight, how_it_ended(end))

    def _close(self, flight: Flight, how: str = "cancelled") -> None:
        """It is over: booking, blocks that nobody took, names and timers go."""
        now_ns = self._clock.now_ns()
        flight.stage = Stage.OVER
        self._waiting.leave(flight, now_ns)
        self._sending.let_go(flight)
        self._flights.pop(flight.job.sequence_id, None)
        flight.record.ended_ns = now_ns
        flight.record.history.note(now_ns, "ended", detail=how)
        if flight.deadline is not None:
            flight.deadline.cancel()
            flight.deadline = None
