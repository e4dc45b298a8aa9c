"""One worker of a simulated fleet: the mock engine's machine, whose steps take their time on the timeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from polyphase.core.errors import Overloaded, PolyphaseError
from polyphase.core.ids import Epoch, WorkerId
from polyphase.engines.interface import StepReport
from polyphase.engines.mock.machine import MockMachine, Stretch
from polyphase.kv import BlockNames
from polyphase.router import WorkerFacts
from polyphase.twin.timeline import Timeline
from polyphase.wire.cards import Role
from polyphase.wire.events import KvEvent, Load
from polyphase.wire.requests import FinishReason, SequenceOutput, Submit, WireFailure
from polyphase.worker.room import QueueLimits

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
    """Publishes events and load when the worker process would: after steps that stored, evicted or ended something, and now and then.

    `longest_stretch`: steps that are played as one while nothing can happen in them; 1: each by itself, with the same outcome.
    """

    def __init__(
        self,
        worker_id: WorkerId,
        machine: MockMachine,
        timeline: Timeline,
        delays: Delays,
        limits: QueueLimits | None = None,
        longest_stretch: int = 1,
    ) -> None:
        self.worker_id = worker_id
        self.machine = machine
        self.busy_ns = 0
        self.computed_prefill_tokens = 0
        self.refusal_count = 0
        self._timeline = timeline
        self._delays = delays
        self._limits = limits
        self._longest_stretch = longest_stretch
        self._listeners: list[Listen] = []
        self._receivers: dict[str, Deliver] = {}
        self._stretch: Stretch | None = None
        self._told_ns = 0
        self._alarm = 0  # counts what was asked of the timeline: of those only the latest is for something

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

    def submit(self, request: Submit, names: BlockNames, deliver: Deliver) -> None:
        """`deliver` gets the first and the last output when they would reach the frontend."""
        stretch = self._stretch
        if stretch is not None:
            self.machine.cut(stretch, self._timeline.now_ns())
        core = self.machine.core
        try:
            if self._limits is not None:
                self._limits.refuse_if_full(request, core.load())
            core.submit_imagined(request, names)
        except PolyphaseError as error:
            load = core.load() if isinstance(error, Overloaded) else None
            self.refusal_count += load is not None
            failure = WireFailure(error.code, error.message, error.is_retryable, load)
            self._send(deliver, SequenceOutput(request_id=request.request_id, finish_reason=FinishReason.ERROR, failure=failure))
        else:
            self._receivers[request.request_id] = deliver
            if stretch is None:
                self._begin()
            if self._timeline.now_ns() - self._told_ns >= self._delays.accept_report_ns:
                self._publish([])
        if self._stretch is not None:
            self._set_alarm(self._stretch)

    def _begin(self) -> None:
        self._stretch = self.machine.begin_stretch(self._timeline.now_ns(), self._longest_stretch)
        if self._stretch is not None:
            self._set_alarm(self._stretch)
            return
        idle = self.machine.core.take_idle_report()
        if idle is not None:
            self._tell(idle)

    def _set_alarm(self, stretch: Stretch) -> None:
        """For the end of the stretch, or of the step in it with which the load is due to be told."""
        self._alarm += 1
        alarm, ends_ns = self._alarm, stretch.ends_ns
        due_ns = self._told_ns + self._delays.load_interval_ns
        wakes_ns = ends_ns[-1] if due_ns > ends_ns[-1] else next(end_ns for end_ns in ends_ns if end_ns >= due_ns)
        self._timeline.at(wakes_ns, lambda: self._wake(stretch, alarm))

    def _wake(self, stretch: Stretch, alarm: int) -> None:
        if alarm != self._alarm:
            return  # the stretch was cut in the meantime, or the load told
        now_ns = self._timeline.now_ns()
        if now_ns < stretch.ends_ns[-1]:
            self.machine.catch_up(stretch, now_ns + 1)
            self._publish([])
            self._set_alarm(stretch)
            return
        self._stretch = None
        self.busy_ns += now_ns - stretch.begun_ns
        self.computed_prefill_tokens += sum([row.count for row in stretch.plan.rows if row.count > 1])
        self._tell(self.machine.finish_stretch(stretch))
        self._begin()

    def _tell(self, report: StepReport) -> None:
        has_finished = False
        for output in report.outputs:
            # Nobody looks at what lies between the first token and the last one: it costs nothing to leave it out.
            if output.finish_reason is not None:
                has_finished = True
                self._send(self._receivers.pop(output.request_id), output)
            elif output.stats is not None:
                self._send(self._receivers[output.request_id], output)
        if report.events or has_finished or self._timeline.now_ns() - self._told_ns >= self._delays.load_interval_ns:
            self._publish(report.events)

    def _publish(self, events: list[KvEvent]) -> None:
        self._told_ns = self._timeline.now_ns()
        load = self.machine.core.load()
        self._timeline.after(self._delays.event_ns, lambda: self._reach_listeners(events, load))

    def _reach_listeners(self, events: list[KvEvent], load: Load) -> None:
        for listener in self._listeners:
            listener(self.worker_id, events, load)

    def _send(self, deliver: Deliver, output: SequenceOutput) -> None:
        self._timeline.after(self._delays.request_ns, lambda: deliver(output))
