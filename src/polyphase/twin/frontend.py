"""One frontend of a simulated fleet: routes with the real router (or another that is to be compared), and notes what requests saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, cast

from polyphase.core.errors import Refused
from polyphase.core.ids import Epoch, RequestId, WorkerId
from polyphase.router import Route, RouteRequest, WorkerFacts
from polyphase.twin.load import Turn
from polyphase.twin.measures import RequestRecord
from polyphase.twin.timeline import Timeline
from polyphase.twin.worker import EPOCH, Delays, SimulatedWorker
from polyphase.wire.events import KvEvent, Load
from polyphase.wire.requests import FinishReason, SamplingParams, SequenceOutput, StopConditions, Submit

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


@dataclass(slots=True)
class _Running:
    turn: Turn
    record: RequestRecord
    when_done: Callable[[], None]
    output_count: int = field(default=0)


class SimulatedFrontend:
    def __init__(self, routing: RoutingCode, workers: Mapping[WorkerId, SimulatedWorker], timeline: Timeline, delays: Delays) -> None:
        self._routing = routing
        self._workers = workers
        self._timeline = timeline
        self._delays = delays
        for worker in workers.values():
            routing.upsert_worker(worker.facts(MODEL))
            worker.listen(self._hear)

    def accept(self, request_id: RequestId, turn: Turn, when_done: Callable[[], None]) -> RequestRecord:
        """Route and send a request; `when_done` is called when its answer has ended, or at once if it was refused."""
        record = RequestRecord(request_id, arrived_ns=self._timeline.now_ns(), prompt_token_count=turn.token_count)
        wanted = RouteRequest(request_id, MODEL, turn.sequence_hashes, turn.token_count, turn.max_tokens)
        try:
            route = self._routing.route(wanted)
        except Refused as error:
            record.refused = error.message
            when_done()
            return record
        record.worker_id = route.decode.worker_id
        record.predicted_block_count = route.decode.overlap_block_count
        submit = Submit(
            request_id=request_id,
            token_ids=cast("list[int]", range(turn.token_count)),  # of which only the number counts
            prompt_token_count=turn.token_count,
            sampling=_SAMPLING,
            stop=StopConditions(max_tokens=turn.max_tokens, ignore_eos=True),
        )
        worker = self._workers[route.decode.worker_id]
        running = _Running(turn, record, when_done)
        self._timeline.after(self._delays.request_ns, lambda: worker.submit(submit, turn.names, lambda output: self._receive(running, output)))
        return record

    def _receive(self, running: _Running, output: SequenceOutput) -> None:
        record = running.record
        if output.stats is not None:
            record.first_token_ns = self._timeline.now_ns()
            record.cached_token_count = output.stats.cached_token_count
            self._routing.mark_prefill_done(record.request_id)
        if output.finish_reason is not None:
            record.ended_ns = self._timeline.now_ns()
            if output.finish_reason is FinishReason.ERROR:
                record.refused = output.failure.message if output.failure else "no reason given"
            self._routing.release(record.request_id)
            running.when_done()

    def _hear(self, worker_id: WorkerId, events: list[KvEvent], load: Load) -> None:
        self._routing.apply(worker_id, EPOCH, events)
        self._routing.report_load(worker_id, EPOCH, load)
