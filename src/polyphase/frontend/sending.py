"""Says to workers what becomes of flights: routes one and submits it, sends it on, takes it back.

    flight ─► request ─► router: a booked route ─► Submit ─► whichever worker takes the message

Knows which life of each worker is the current one, and under which name each flight travels. Decides nothing about what follows from an
answer, and nothing about who waits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from polyphase.core.clock import Clock
from polyphase.core.errors import WorkerLost
from polyphase.core.ids import Epoch, RequestId, SequenceHash, WorkerId
from polyphase.frontend.flight import NEVER, NOBODY, Flight, Stage
from polyphase.frontend.metrics import Metrics
from polyphase.frontend.predictions import Predictions
from polyphase.router import Refusals, Route, Router, RouteRequest, believed_tokens
from polyphase.wire.cards import Role
from polyphase.wire.kv import KvPart, Offer
from polyphase.wire.requests import Cancel, HandOver, ReleaseLease, ToWorker

log = logging.getLogger(__name__)

Send = Callable[[str, ToWorker], None]  # raises WorkerLost


class Sending:
    """`send` is the request channel's."""

    def __init__(
        self, router: Router, send: Send, metrics: Metrics, predictions: Predictions, clock: Clock, *, has_kv_flow: bool = True
    ) -> None:
        self._router = router
        self._send = send
        self._metrics = metrics
        self._predictions = predictions
        self._clock = clock
        self._has_kv_flow = has_kv_flow
        self._epochs: dict[WorkerId, Epoch] = {}
        self._by_wire_id: dict[RequestId, Flight] = {}
        self.refusals = Refusals()

    # Lives of workers, and names of flights

    def joined(self, worker_id: WorkerId, epoch: Epoch) -> None:
        self._epochs[worker_id] = epoch
        self.refusals.forget(worker_id)

    def left(self, worker_id: WorkerId, epoch: Epoch) -> None:
        if self.lives(worker_id, epoch):
            del self._epochs[worker_id]

    def lives(self, worker_id: str, epoch: int) -> bool:
        """Whether this life of the worker is the current one."""
        return self._epochs.get(WorkerId(worker_id)) == epoch

    def flight_of(self, wire_id: str, worker_id: str, epoch: int) -> Flight | None:
        """The flight that travels under this name, if this life of this worker has it now."""
        flight = self._by_wire_id.get(RequestId(wire_id))
        return flight if flight is not None and flight.worker_id == worker_id and flight.epoch == epoch else None

    # To workers

    def depart(self, flight: Flight) -> None:
        """Route and submit; tries one worker after the other until one takes the message. Raises: NoWorkers, Overloaded."""
        job = flight.job
        hashes = flight.hashes()
        while True:
            flight.worker_id, flight.epoch = NOBODY, NEVER  # so that nothing that becomes of the last one concerns it
            started = time.perf_counter()
            request = self.request_of(flight, hashes)
            route = self.refusals.route(self._router.route, request, self._clock.now_ns(), self._router.has_headroom)
            self._metrics.decision_s.observe(time.perf_counter() - started)
            flight.route = route
            self._rename(flight)
            offer = self._usable_offer(flight)
            # Where KV waits to be taken, no second prefill is wanted.
            splits = route.prefill is not None and offer is None
            place = route.prefill if splits and route.prefill else route.decode
            if route.prefill is not None and not splits:
                self._router.mark_prefill_done(job.sequence_id)
            flight.worker_id, flight.epoch = place.worker_id, place.epoch
            flight.roles = self._roles_in(route)
            now_ns = self._clock.now_ns()
            flight.note_route(route, now_ns, is_split=splits)
            flight.predict(route, now_ns, self._predictions.removed_block_count)
            try:
                believed = believed_tokens(place, flight.attempts)
                has_flow = splits and self._has_kv_flow
                submit = flight.submit(now_ns, hand_over=splits, with_parts=has_flow, offer=offer, believed_prefill_tokens=believed)
                self._send(place.worker_id, submit)
            except WorkerLost as error:
                log.warning("%s: %s", flight.wire_id, error.message)
                flight.note_break(now_ns, error.message)
                flight.tried.add((place.worker_id, place.epoch))
                continue
            flight.sent_ns, flight.answered_ns = now_ns, 0
            if flight.record.queued_ns and not flight.record.admitted_ns:
                flight.record.admitted_ns = now_ns
                waited_s = (now_ns - flight.record.queued_ns) / 1e9
                flight.record.history.note(now_ns, "admitted", detail=f"a worker had room after {waited_s:.2f} s")
            flight.record.history.note(now_ns, "sent", place.worker_id, "to compute the prompt" if splits else "to serve it")
            flight.stage = Stage.PREFILL if splits else Stage.SERVING
            self._metrics.routes.labels(job.model, "split" if splits else "whole").inc()
            return

    def hand_over(self, flight: Flight, offer: Offer | None, now_ns: int) -> None:
        """On to the decode worker of its route, with what the prefill worker offers. Raises: WorkerLost; that counts as its loss there."""
        assert flight.route is not None
        place = flight.route.decode
        flight.worker_id, flight.epoch, flight.stage, flight.is_leaving = place.worker_id, place.epoch, Stage.SERVING, False
        self._send(place.worker_id, flight.submit(now_ns, offer=offer))
        flight.sent_ns, flight.answered_ns = now_ns, 0
        flight.record.history.note(now_ns, "handed over", place.worker_id)

    def pass_on(self, flight: Flight, part: KvPart) -> None:
        """Blocks of a prompt that is still being computed: the decode worker that was chosen may pull them already."""
        if flight.stage is Stage.PREFILL and flight.route is not None:
            place = flight.route.decode
            if self.lives(place.worker_id, place.epoch):
                self._try_send(place.worker_id, flight.pull_ahead(part))

    def ask_back(self, flight: Flight) -> bool:
        """Ask its worker to hand it over. Returns: whether that worker can be told."""
        flight.is_leaving = self._try_send(flight.worker_id, HandOver(flight.wire_id))
        return flight.is_leaving

    def call_off(self, flight: Flight) -> None:
        """Nobody wants it any more where it is."""
        if flight.stage in (Stage.PREFILL, Stage.SERVING):
            self._try_send(flight.worker_id, Cancel(flight.wire_id))

    def let_go(self, flight: Flight) -> None:
        """It is over: booking, name, and blocks that nobody took go."""
        self.release_offer(flight)
        self._router.release(flight.job.sequence_id)
        self._by_wire_id.pop(flight.wire_id, None)

    # For the router

    def request_of(self, flight: Flight, hashes: list[SequenceHash] | None = None) -> RouteRequest:
        job = flight.job
        return RouteRequest(
            request_id=job.sequence_id,
            model=job.model,
            sequence_hashes=flight.hashes() if hashes is None else hashes,
            prompt_token_count=len(job.prompt_ids) + len(flight.emitted),
            max_output_tokens=flight.remaining_tokens,
            excluded=frozenset(worker for worker, epoch in flight.tried if self.lives(worker, epoch)) | flight.avoided,
            now_ns=self._clock.now_ns(),
            session=job.hints.session,
            preferred_labels=job.hints.preferred_labels,
            required_labels=job.hints.required_labels,
        )

    def is_as_chosen(self, flight: Flight, worker_id: WorkerId) -> bool:
        """Whether the worker still is what it was when the route was chosen."""
        facts = self._router.facts_of(worker_id)
        return facts is not None and facts.is_available and facts.role is flight.roles.get(worker_id)

    def _roles_in(self, route: Route) -> dict[WorkerId, Role]:
        places = [place.worker_id for place in (route.prefill, route.decode) if place is not None]
        return {worker_id: facts.role for worker_id in places if (facts := self._router.facts_of(worker_id)) is not None}

    def _rename(self, flight: Flight) -> None:
        flight.is_leaving = False
        self._by_wire_id.pop(flight.wire_id, None)
        flight.attempts += 1
        suffix = f".{flight.attempts}" if flight.attempts > 1 else ""
        flight.wire_id = RequestId(f"{flight.job.sequence_id}{suffix}")
        self._by_wire_id[flight.wire_id] = flight

    def _usable_offer(self, flight: Flight) -> Offer | None:
        """The offer that is still open, if its owner lives and keeps it."""
        offer = flight.offer
        if offer is None:
            return None
        if self.lives(offer.worker_id, offer.epoch) and self._clock.now_ns() < offer.expires_at_ns:
            return offer
        flight.offer = None
        return None

    def release_offer(self, flight: Flight) -> None:
        """Nobody will fetch this KV. (If somebody is at its blocks just now, their generation tells it that they changed.)"""
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
