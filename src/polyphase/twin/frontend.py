"""One frontend of a simulated fleet: routes with the real router (or another that is to be compared), and notes what requests saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

from polyphase.core.errors import Refused
from polyphase.core.ids import Epoch, RequestId, WorkerId
from polyphase.router import Refusals, Route, RouteRequest, WorkerFacts, believed_tokens, is_refusal
from polyphase.twin.load import Turn
from polyphase.twin.measures import RequestRecord
from polyphase.twin.timeline import Timeline
from polyphase.twin.worker import EPOCH, Delays, SimulatedWorker
from polyphase.wire.events import KvEvent, Load
from polyphase.wire.requests import SamplingParams, SequenceOutput, StopConditions, Submit, WireFailure

MODEL = "twin"
_SAMPLING = SamplingParams(seed=0)


class RoutingCode(Protocol):
    """What of `router.Router` a frontend needs; a peer's formula that is compared implements the same."""

    def upsert_worker(self, facts: WorkerFacts) -> None: ...

    def apply(self, worker_id: WorkerId, epoch: Epoch, events: list[KvEvent]) -> None: ...

    def report_load(self, worker_id: WorkerId, epoch: Epoch, load: Load) -> None: ...

    def route(self, request: RouteRequest) -> Route: ...

    def mark_prefill_done(self, request_id: RequestId) -> None: ...

    def release(self, request_id: RequestId) -> None: ...


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a request that a worker refused is offered to others before it is refused for good. As the dispatcher has it."""

    wait_ns: int = 5_000_000_000
    retry_ns: int = 100_000_000  # between tries while nobody has room


@dataclass(slots=True)
class _Running:
    turn: Turn
    record: RequestRecord
    when_done: Callable[[], None]
    attempts: int = 0
    waits_until_ns: int = 0


class SimulatedFrontend:
    """Routes at once; a queue before the router would stand between `accept` and `_depart`."""

    def __init__(
        self,
        routing: RoutingCode,
        workers: Mapping[WorkerId, SimulatedWorker],
        timeline: Timeline,
        delays: Delays,
        patience: Patience | None = None,
    ) -> None:
        self.routing = routing
        self._workers = workers
        self._timeline = timeline
        self._delays = delays
        self._patience = patience or Patience()
        self._refusals = Refusals()
        for worker in workers.values():
            routing.upsert_worker(worker.facts(MODEL))
            worker.listen(self._hear)

    def accept(self, request_id: RequestId, turn: Turn, when_done: Callable[[], None]) -> RequestRecord:
        """Route and send a request; `when_done` is called when its answer has ended, or at once if it was refused."""
        record = RequestRecord(request_id, arrived_ns=self._timeline.now_ns(), prompt_token_count=turn.token_count)
        running = _Running(turn, record, when_done)
        try:
            self._depart(running)
        except Refused as refusal:
            self._refuse(running, refusal.message)
        return record

    def _depart(self, running: _Running) -> None:
        """Raises: Refused."""
        turn, record = running.turn, running.record
        wanted = RouteRequest(record.request_id, MODEL, turn.sequence_hashes, turn.token_count, turn.max_tokens)
        route = self._refusals.route(self.routing.route, wanted, self._timeline.now_ns())
        worker_id = route.decode.worker_id
        record.worker_id = worker_id
        record.predicted_block_count = route.decode.overlap_block_count
        running.attempts += 1
        submit = Submit(
            request_id=record.request_id if running.attempts == 1 else f"{record.request_id}.{running.attempts}",
            token_ids=cast("list[int]", range(turn.token_count)),  # of which only the number counts
            prompt_token_count=turn.token_count,
            sampling=_SAMPLING,
            stop=StopConditions(max_tokens=turn.max_tokens, ignore_eos=True),
            believed_prefill_tokens=believed_tokens(route.decode, running.attempts),
        )
        worker = self._workers[worker_id]
        self._timeline.after(
            self._delays.request_ns, lambda: worker.submit(submit, turn.names, lambda output: self._receive(running, output))
        )

    def _depart_again(self, running: _Running) -> None:
        """A refusal is waited out for a while."""
        try:
            self._depart(running)
        except Refused as refusal:
            if self._timeline.now_ns() >= running.waits_until_ns:
                self._refuse(running, refusal.message)
            else:
                self._timeline.after(self._patience.retry_ns, lambda: self._depart_again(running))

    def _receive(self, running: _Running, output: SequenceOutput) -> None:
        record, now_ns = running.record, self._timeline.now_ns()
        failure = output.failure
        if failure is not None and failure.is_retryable and is_refusal(failure.code):
            self._turn_away(running, failure)
            return
        if output.stats is not None:
            record.first_token_ns = now_ns
            record.cached_token_count = output.stats.cached_token_count
            self.routing.mark_prefill_done(record.request_id)
        if failure is not None:
            self._refuse(running, failure.message)
        elif output.finish_reason is not None:
            record.ended_ns = now_ns
            self.routing.release(record.request_id)
            running.when_done()

    def _turn_away(self, running: _Running, failure: WireFailure) -> None:
        """The worker is full, or busier than believed; with its true load, another choice is made at once."""
        worker_id, now_ns = running.record.worker_id, self._timeline.now_ns()
        assert worker_id is not None, "a worker refused"
        running.record.refusal_count += 1
        self._refusals.note(worker_id, failure.code, now_ns)
        if failure.load is not None:
            self.routing.report_load(worker_id, EPOCH, failure.load)
        if not running.waits_until_ns:
            running.waits_until_ns = now_ns + self._patience.wait_ns
        self._depart_again(running)

    def _refuse(self, running: _Running, why: str) -> None:
        """For good."""
        running.record.ended_ns = self._timeline.now_ns()
        running.record.refused = why
        self.routing.release(running.record.request_id)
        running.when_done()

    def _hear(self, worker_id: WorkerId, events: list[KvEvent], load: Load) -> None:
        self._refusals.forget(worker_id)
        if events:
            self.routing.apply(worker_id, EPOCH, events)
        self.routing.report_load(worker_id, EPOCH, load)
