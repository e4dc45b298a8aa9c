"""Compares, request by request, the cached tokens that the router predicted with those that engines report, and says when they drift apart.

    route ─ prediction, blocks removed so far ─► first output ─ reported ─► a moment later ─ known to the index now ─► drift watch

The moment is there because events come on another way than outputs: a prefix that was computed between routing and running is
announced about when the request's own first token arrives. Alarms show in the log, in `/metrics`, in `/health`, and in `polyphase status`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from polyphase.core.clock import Clock
from polyphase.core.ids import Epoch, SequenceHash, WorkerId
from polyphase.frontend.metrics import Metrics
from polyphase.router import Drift, DriftWatch, Router, Sample, StreamFacts, WorkerFacts
from polyphase.wire.events import AllCleared, BlocksRemoved, KvEvent, Load, Tier

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 1.0
EVENTS_LAG_NS = 1_500_000_000  # workers publish after the step, and at least once a second
MAX_PENDING = 4096  # beyond, the oldest are not judged


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one leg, as of its routing."""

    worker_id: WorkerId
    epoch: Epoch
    routed_ns: int
    hashes: Sequence[SequenceHash]
    prompt_tokens: int
    predicted: int
    removed_before: int
    is_salted: bool


@dataclass(slots=True)
class _Worker:
    facts: WorkerFacts
    last_batch_ns: int | None = None
    load: Load | None = None
    removed_block_count: int = 0  # ever, in this life


class Predictions:
    """Used on one event loop. The fleet tells of workers and events, the dispatcher of requests; somebody calls `check` once a second."""

    def __init__(self, router: Router, metrics: Metrics, clock: Clock) -> None:
        self._router = router
        self._metrics = metrics
        self._clock = clock
        self._watch = DriftWatch()
        self._workers: dict[WorkerId, _Worker] = {}
        self._pending: deque[tuple[int, Prediction, int]] = deque(maxlen=MAX_PENDING)  # reported when, what, tokens
        self.drifts: dict[WorkerId, Drift] = {}  # those that drift now

    # Workers

    def worker_joined(self, facts: WorkerFacts) -> None:
        known = self._workers.get(facts.worker_id)
        if known is None or known.facts.epoch != facts.epoch:
            self.worker_left(facts.worker_id)
            self._workers[facts.worker_id] = _Worker(facts)
            self._watch.begin(facts.worker_id, facts.epoch, facts.block_size, self._clock.now_ns())

    def worker_left(self, worker_id: WorkerId) -> None:
        self._workers.pop(worker_id, None)
        self._watch.forget(worker_id)
        self._clear(worker_id)

    def note_load(self, worker_id: WorkerId, load: Load) -> None:
        """Each batch of the event stream brings one."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.last_batch_ns, worker.load = self._clock.now_ns(), load

    def note_events(self, worker_id: WorkerId, events: list[KvEvent]) -> None:
        worker = self._workers.get(worker_id)
        if worker is not None:
            for event in events:
                match event:
                    case BlocksRemoved(tier=Tier.DEVICE):  # what goes further down is found there, and what goes there was not predicted
                        worker.removed_block_count += len(event.sequence_hashes)
                    case AllCleared():
                        worker.removed_block_count += 1
                    case _:
                        pass

    def removed_block_count(self, worker_id: WorkerId) -> int:
        worker = self._workers.get(worker_id)
        return 0 if worker is None else worker.removed_block_count

    # Requests

    def note_report(self, prediction: Prediction, reported: int) -> None:
        """An engine told how much of a prompt it found in its cache."""
        self._metrics.predicted_cached_tokens.labels(prediction.worker_id).inc(prediction.predicted)
        self._metrics.reported_cached_tokens.labels(prediction.worker_id).inc(reported)
        self._pending.append((self._clock.now_ns(), prediction, reported))

    # In the course of time

    def check(self, repair_count: Callable[[str], int]) -> None:
        """Judge what was reported a while ago; begin and end alarms. `repair_count` is the event stream's, by worker."""
        now_ns = self._clock.now_ns()
        while self._pending and self._pending[0][0] <= now_ns - EVENTS_LAG_NS:
            _, prediction, reported = self._pending.popleft()
            self._judge(prediction, reported)
        for worker_id, worker in self._workers.items():
            drift = self._watch.judge(worker_id, self._stream_facts(worker, now_ns, repair_count(worker_id)), now_ns)
            before = self.drifts.get(worker_id)
            if drift is None:
                if before is not None:
                    log.info("worker %s: predicted and reported cached tokens agree again", worker_id)
                    self._clear(worker_id)
                continue
            if before is None or before.reason is not drift.reason:
                log.warning("worker %s: %s (%s)", worker_id, drift.message, drift.reason)
                self._clear(worker_id)
                self._metrics.prediction_drift.labels(worker_id, drift.reason.value).set(1)
            self.drifts[worker_id] = drift

    def _judge(self, prediction: Prediction, reported: int) -> None:
        worker = self._workers.get(prediction.worker_id)
        if worker is None or worker.facts.epoch != prediction.epoch:
            return
        known_later = self._router.cached_block_count(prediction.worker_id, prediction.hashes) * worker.facts.block_size
        sample = Sample(
            routed_ns=prediction.routed_ns,
            prompt_tokens=prediction.prompt_tokens,
            predicted=prediction.predicted,
            reported=reported,
            known_later=known_later,
            removed_block_count=worker.removed_block_count - prediction.removed_before,
            is_salted=prediction.is_salted,
        )
        self._watch.note(prediction.worker_id, prediction.epoch, sample)

    def _stream_facts(self, worker: _Worker, now_ns: int, repair_count: int) -> StreamFacts:
        load = worker.load
        return StreamFacts(
            silent_ns=None if worker.last_batch_ns is None else now_ns - worker.last_batch_ns,
            indexed_block_count=self._router.indexed_block_count(worker.facts.worker_id),
            held_block_count=load.used_block_count + load.cached_block_count if load else 0,
            pool_block_count=worker.facts.block_count,
            repair_count=repair_count,
        )

    def _clear(self, worker_id: WorkerId) -> None:
        drift = self.drifts.pop(worker_id, None)
        if drift is not None:
            self._metrics.prediction_drift.remove(worker_id, drift.reason.value)
