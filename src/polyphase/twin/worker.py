"""One worker of a simulated fleet: the mock engine's machine, whose steps take their time on the timeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from polyphase.core.errors import PolyphaseError
from polyphase.core.ids import Epoch, WorkerId
from polyphase.engines.interface import StepReport
from polyphase.engines.mock.machine import MockMachine, StartedStep
from polyphase.router import WorkerFacts
from polyphase.twin.timeline import Timeline
from polyphase.wire.cards import Role
from polyphase.wire.events import KvEvent, Load
from polyphase.wire.requests import FinishReason, SequenceOutput, Submit, WireFailure

Deliver = Callable[[SequenceOutput], None]
Listen = Callable[[WorkerId, list[KvEvent], Load], None]

EPOCH = Epoch(1)


@dataclass(frozen=True, slots=True)
class Delays:
    """How long messages are under way."""

    request_ns: int = 200_000  # between frontends and workers, each way
    event_ns: int = 2_000_000  # from a worker's step to a router's index
    load_interval_ns: int = 100_000_000  # between load reports while nothing else is to be told, as the worker process does it
    accept_report_ns: int = 5_000_000  # between load reports that only tell that something was accepted


class SimulatedWorker:
    """Publishes events and load when the worker process would: after steps that stored, evicted or ended something, and now and then."""

    def __init__(self, worker_id: WorkerId, machine: MockMachine, timeline: Timeline, delays: Delays) -> None:
        self.worker_id = worker_id
        self.machine = machine
        self.busy_ns = 0
        self.computed_prefill_tokens = 0
        self._timeline = timeline
        self._delays = delays
        self._listeners: list[Listen] = []
        self._receivers: dict[str, Deliver] = {}
        self._is_stepping = False
        self._told_ns = 0

    def facts(self, model: str) -> WorkerFacts:
        card = self.machine.card
        return WorkerFacts(
            worker_id=self.worker_id,
            epoch=EPOCH,
            model=model,
            role=Role.BOTH,
            block_size=card.block_size,
            block_count=card.block_count,
            max_batch_tokens=card.max_batch_tokens,
            max_running=card.max_running,
            can_hand_over=False,
        )

    def listen(self, listener: Listen) -> None:
        self._listeners.append(listener)

    def submit(self, request: Submit, deliver: Deliver) -> None:
        """`deliver` gets each output when it would reach the frontend."""
        try:
            self.machine.core.submit(request, None)
        except PolyphaseError as error:
            failure = WireFailure(error.code, error.message, error.is_retryable)
            self._send(deliver, SequenceOutput(request_id=request.request_id, finish_reason=FinishReason.ERROR, failure=failure))
            return
        self._receivers[request.request_id] = deliver
        self._begin()
        if self._timeline.now_ns() - self._told_ns >= self._delays.accept_report_ns:
            self._publish([])

    def _begin(self) -> None:
        if self._is_stepping:
            return
        step = self.machine.begin_step()
        if step is None:
            idle = self.machine.core.take_idle_report()
            if idle is not None:
                self._tell(idle)
            return
        self._is_stepping = True
        self._timeline.after(step.duration_ns, lambda: self._end(step))

    def _end(self, step: StartedStep) -> None:
        self._is_stepping = False
        self.busy_ns += step.duration_ns
        self.computed_prefill_tokens += sum(row.count for row in step.plan.rows if row.count > 1)
        self._tell(self.machine.finish_step(step))
        self._begin()

    def _tell(self, report: StepReport) -> None:
        has_finished = False
        for output in report.outputs:
            if output.finish_reason is None:
                deliver = self._receivers[output.request_id]
            else:
                deliver = self._receivers.pop(output.request_id)
                has_finished = True
            # Nobody looks at what lies between the first token and the last one: it costs nothing to leave it out.
            if output.stats is not None or output.finish_reason is not None:
                self._send(deliver, output)
        now_ns = self._timeline.now_ns()
        if report.events or has_finished or now_ns - self._told_ns >= self._delays.load_interval_ns:
            self._publish(report.events)

    def _publish(self, events: list[KvEvent]) -> None:
        self._told_ns = self._timeline.now_ns()
        load = self.machine.core.load()
        for listener in self._listeners:
            self._timeline.after(self._delays.event_ns, lambda listener=listener: listener(self.worker_id, events, load))  # type: ignore[misc]

    def _send(self, deliver: Deliver, output: SequenceOutput) -> None:
        self._timeline.after(self._delays.request_ns, lambda: deliver(output))
