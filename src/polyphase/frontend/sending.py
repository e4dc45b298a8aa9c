"""Says to workers what becomes of flights: routes one and submits it, sends it on, takes it back.

    flight ─► request ─► router: a booked route ─► Submit ─► whichever worker takes the message

Knows which life of each worker is the current one, and under which name each flight travels. Decides nothing about what follows from an
answer, and nothing about who waits.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

from polyphase.core.clock import Clock
from polyphase.core.errors import WorkerLost
from polyphase.core.ids import Epoch, RequestId, WorkerId
from polyphase.frontend.flight import NEVER, NOBODY, Flight, Stage
from polyphase.frontend.metrics import Metrics
from polyphase.frontend.predictions import Predictions
from polyphase.router import Refusals, Route, Router, RouteRequest, believed_tokens
from polyphase.runtime import Repeats
from polyphase.wire.cards import Role
from polyphase.wire.kv import KvPart, Offer
from polyphase.wire.requests import Cancel, HandOver, KvHolder, ReadOn, ReleaseLease, ToWorker

log = logging.getLogger(__name__)

NOTHING_NEEDED: frozenset[str] = frozenset()
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
        self._endpoints: dict[WorkerId, str | None] = {}  # where other workers reach it
        self._by_wire_id: dict[RequestId, Flight] = {}
        self.refusals = Refusals()
        self._repeats = Repeats(clock)

    # Lives of workers, and names of flights

    def joined(self, worker_id: WorkerId, epoch: Epoch, endpoint: str | None = None) -> None:
        self._epochs[worker_id] = epoch
        self._endpoints[worker_id] = endpoint
        self.refusals.forget(worker_id)

    def left(self, worker_id: WorkerId, epoch: Epoch) -> None:
        if self.lives(worker_id, epoch):
            del self._epochs[worker_id], self._endpoints[worker_id]

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
        while True:
            flight.worker_id, flight.epoch = NOBODY, NEVER  # so that nothing that becomes of the last one concerns it
            started = time.perf_counter()
            request = self.request_of(flight)
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
            holder = self._holder(flight, route, is_split=splits)
            flight.holder = None if holder is None else WorkerId(holder.worker_id)
            now_ns = self._clock.now_ns()
            flight.note_route(route, now_ns, is_split=splits)
            try:
                if job.passing is not None:
                    self._send(place.worker_id, flight.forward(job.passing, now_ns))
                else:
                    flight.predict(route, now_ns, self._predictions.removed_block_count)
                    believed = believed_tokens(place, flight.attempts)
                    has_flow = splits and self._has_kv_flow
                    submit = flight.submit(
                        now_ns, hand_over=splits, with_parts=has_flow, offer=offer, holder=holder, believed_prefill_tokens=believed
                    )
                    self._send(place.worker_id, submit)
            except WorkerLost as error:
                log.warning("%s: %s", flight.wire_id, error.message)
                flight.note_break(now_ns, error.message)
                flight.tried.add((place.worker_id, place.epoch))
                continue
            flight.sent_ns, flight.answered_ns = now_ns, 0
            if job.passing is not None and not job.passing.wants_stream:
                self._router.mark_prefill_done(job.sequence_id)  # nothing tells when it is; booked to the end, it would count for too much
            if flight.record.queued_ns and not flight.record.admitted_ns:
                flight.record.admitted_ns = now_ns
                waited_s = (now_ns - flight.record.queued_ns) / 1e9
                flight.record.history.note(now_ns, "admitted", detail=f"a worker had room after {waited_s:.2f} s")
            what = "to compute the prompt" if splits else "to serve it"
            source = "" if holder is None else f", with KV that {holder.worker_id} may have"
            flight.record.history.note(now_ns, "sent", place.worker_id, what + source)
            flight.stage = Stage.PREFILL if splits else Stage.SERVING
            self._metrics.routes.labels(job.model, "split" if splits else "whole").inc()
            return

    def hand_over(self, flight: Flight, offer: Offer | None, now_ns: int) -> None:
        """On to the decode worker of its route, with what the prefill worker offers. Raises: WorkerLost; that counts as its loss there."""
        assert flight.route is not None
        place = flight.route.decode
        flight.worker_id, flight.epoch, flight.stage, flight.is_leaving = place.worker_id, place.epoch, Stage.SERVING, False
        flight.holder = None
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

    def read_on(self, flight: Flight, byte_count: int) -> None:
        """So much of its answer has gone on to the client."""
        if flight.stage is Stage.SERVING:
            self._try_send(flight.worker_id, ReadOn(flight.wire_id, byte_count))

    def call_off(self, flight: Flight) -> None:
        """Nobody wants it any more where it is."""
        if flight.stage in (Stage.PREFILL, Stage.SERVING):
            self._try_send(flight.worker_id, Cancel(flight.wire_id))

    def say_again(self, worker_id: str) -> None:
        """The connection to this worker broke and stands anew: what it was told last to end may have been lost."""
        for message in self._repeats.of(worker_id):
            with contextlib.suppress(WorkerLost):
                self._send(worker_id, message)

    def let_go(self, flight: Flight) -> None:
        """It is over: booking, name, and blocks that nobody took go."""
        self.release_offer(flight)
        self._router.release(flight.job.sequence_id)
        self._by_wire_id.pop(flight.wire_id, None)

    # For the router

    def request_of(self, flight: Flight) -> RouteRequest:
        job = flight.job
        block_size, *others = self._router.block_sizes(job.model) or (job.block_size,)
        return RouteRequest(
            request_id=job.sequence_id,
            model=job.model,
            sequence_hashes=flight.hashes(block_size),
            prompt_token_count=job.prompt_token_count + len(flight.emitted),
            max_output_tokens=flight.remaining_tokens,
            excluded=frozenset(worker for worker, epoch in flight.tried if self.lives(worker, epoch)) | flight.avoided,
            now_ns=self._clock.now_ns(),
            session=job.hints.session,
            preferred_labels=job.hints.preferred_labels,
            required_labels=job.hints.required_labels,
            needs=NOTHING_NEEDED if job.passing is None else job.passing.needs,
            has_grammar=job.grammar is not None,
            is_begun=bool(flight.emitted),
            adapter=job.lora,
            other_hashes={size: flight.hashes(size) for size in others} if others else None,
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

    def _holder(self, flight: Flight, route: Route, *, is_split: bool) -> KvHolder | None:
        """Whom the worker that computes the prompt should ask for blocks. Nobody where blocks are offered."""
        pull = route.pull
        if pull is None or flight.offer is not None or is_split != (route.prefill is not None):
            return None
        if not pull.is_wanted:
            flight.metrics.pulls_waived.inc()
            return None
        endpoint = self._endpoints.get(pull.holder)
        if endpoint is None or not self.lives(pull.holder, pull.epoch):
            return None
        return KvHolder(pull.holder, pull.epoch, endpoint, pull.token_count, pull.compute_ms)

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
        if isinstance(message, Cancel | ReleaseLease):
            self._repeats.note(worker_id, message)
        return True
