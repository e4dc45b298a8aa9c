"""Watches over the workers that are there: quarantines those that stand still, and moves what no longer belongs where it is.

fleet ── joined · changed · left · sent · outputs · loads ──► FleetWatch ──► router: who stands still
                                        every 250 ms ──┘          └────────► dispatcher: break off, or ask for
"""

from __future__ import annotations

import asyncio
import logging

from polyphase.core.clock import Clock, MonotonicClock
from polyphase.core.ids import WorkerId
from polyphase.frontend.dispatch import Dispatcher
from polyphase.frontend.relocation import Relocation, has_another
from polyphase.frontend.settings import FrontendSettings
from polyphase.frontend.stall import Recovered, Stalled, StallWatch
from polyphase.router import Router, WorkerFacts, misfits
from polyphase.wire.events import Load
from polyphase.wire.requests import Forward, StepOutputs, Submit, ToWorker

log = logging.getLogger(__name__)


class FleetWatch:
    """Used on one event loop; `run` as a task."""

    def __init__(self, router: Router, dispatcher: Dispatcher, settings: FrontendSettings, clock: Clock | None = None) -> None:
        self._router = router
        self._dispatcher = dispatcher
        self._settings = settings
        self._clock = clock or MonotonicClock()
        self._stalls = StallWatch(settings.stall)
        self._relocation = Relocation(settings.drain_patience_s)
        self._misfits: set[str] = set()  # as told
        self._reasons: dict[WorkerId, str] = {}  # of those that stand still

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._settings.stall.interval_s)
            self.check()

    def joined(self, facts: WorkerFacts) -> None:
        self._reasons.pop(facts.worker_id, None)
        self._stalls.joined(facts.worker_id, facts.max_batch_tokens, self._clock.now_ns())
        self._tell_misfits(facts.model)
        self.relocate()

    def changed(self, before: WorkerFacts, after: WorkerFacts) -> None:
        """The same life of a worker; the router knows of it."""
        if after.role is not before.role:
            log.info("worker %s: role %s, was %s", after.worker_id, after.role, before.role)
            self._dispatcher.metrics.role_changes.labels(after.worker_id, after.role.value).inc()
        if after.is_asleep is not before.is_asleep:
            log.info("worker %s %s", after.worker_id, "falls asleep" if after.is_asleep else "is awake")
        if after.is_draining and not before.is_draining:
            log.info("worker %s drains", after.worker_id)
        if after.role is not before.role:
            self._tell_misfits(after.model)
        self.relocate()

    def left(self, worker_id: WorkerId) -> None:
        self._reasons.pop(worker_id, None)
        self._stalls.left(worker_id)

    def note_sent(self, worker_id: str, message: ToWorker) -> None:
        if isinstance(message, Submit):
            self._stalls.note_sent(WorkerId(worker_id), len(message.token_ids), self._clock.now_ns())
        elif isinstance(message, Forward):
            self._stalls.note_sent(WorkerId(worker_id), message.prompt_token_count, self._clock.now_ns())

    def note_outputs(self, outputs: StepOutputs) -> None:
        self._stalls.note_step(WorkerId(outputs.worker_id), outputs.step, self._clock.now_ns())

    def note_load(self, worker_id: WorkerId, load: Load) -> None:
        self._stalls.note_load(worker_id, load, self._clock.now_ns())

    def check(self) -> None:
        for change in self._stalls.check(self._clock.now_ns()):
            match change:
                case Stalled(worker_id, reason):
                    log.warning("worker %s stands still and gets no requests: %s", worker_id, reason)
                    self._dispatcher.metrics.stalls.labels(worker_id).inc()
                    self._reasons[worker_id] = reason
                    self._router.set_stalled(worker_id, True)
                case Recovered(worker_id):
                    log.info("worker %s makes progress again", worker_id)
                    self._reasons.pop(worker_id, None)
                    self._router.set_stalled(worker_id, False)
        self.relocate()

    def _tell_misfits(self, model: str) -> None:
        """Before the first request is served in another way than it was meant."""
        found = set(misfits(facts for facts in self._router.facts() if facts.model == model))
        for line in sorted(found - self._misfits):
            log.warning("%s; requests are not split between them", line)
        self._misfits |= found

    def relocate(self) -> None:
        """Whatever should be elsewhere and can be."""
        fleet = self._router.facts()
        for facts in fleet:
            if facts.is_stalled and has_another(facts, fleet):
                count = self._dispatcher.worker_stalled(facts.worker_id, facts.epoch, self._reasons.get(facts.worker_id, "no progress"))
                if count:
                    log.warning("worker %s: %d sequences go on elsewhere", facts.worker_id, count)
        for facts, stages in self._relocation.review(fleet, self._clock.now_ns()):
            count = self._dispatcher.ask_to_hand_over(facts.worker_id, facts.epoch, stages)
            if count:
                log.info("worker %s is asked to hand %d sequences over", facts.worker_id, count)
