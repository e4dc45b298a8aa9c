"""Several frontends that know nothing of each other, and workers that they share, over a network that delays each message as it likes.

Each worker decides at its own door, with all that it took before: so what it has taken never exceeds its limits, whatever the frontends
believe. Nothing booked is lost or forgotten while its request lives, and nothing is left when all have ended.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from polyphase.core.clock import ManualClock
from polyphase.core.errors import Overloaded, Refused
from polyphase.core.hashing import sequence_hashes
from polyphase.core.ids import Epoch, RequestId, WorkerId
from polyphase.frontend.dispatch import Dispatcher
from polyphase.frontend.flight import Flight, Job, Stage
from polyphase.frontend.inbox import Inbox
from polyphase.frontend.metrics import Metrics
from polyphase.frontend.settings import FrontendSettings
from polyphase.router import AdmissionSettings, Router, RouterSettings, WorkerFacts
from polyphase.wire.cards import Role
from polyphase.wire.events import Load
from polyphase.wire.requests import Cancel, FinishReason, SamplingParams, SequenceOutput, StepOutputs, StopConditions, Submit, WireFailure
from polyphase.wire.requests import ToWorker as Message
from polyphase.worker.room import QueueLimits

from .test_dispatch import Timers

EPOCH = Epoch(1)
MAX_RUNNING = 2
LONGEST_PROMPT = 96
LIMITS = QueueLimits(max_waiting_requests=4, max_waiting_prefill_tokens=192)


@dataclass
class Worker:
    """Takes what its limits allow, runs two at a time, and computes a prompt in one go."""

    worker_id: WorkerId
    waiting: dict[str, tuple[int, Submit]] = field(default_factory=dict)  # by request: whose, and what
    running: dict[str, tuple[int, Submit]] = field(default_factory=dict)
    most_waiting: int = 0
    most_tokens: int = 0

    def load(self) -> Load:
        tokens = sum(len(submit.token_ids) for _, submit in self.waiting.values())
        return Load(running_count=len(self.running), waiting_count=len(self.waiting), waiting_prefill_tokens=tokens, block_count=1000)

    def take(self, frontend: int, message: Message) -> SequenceOutput | None:
        if isinstance(message, Cancel):
            known = self.waiting.pop(message.request_id, None) or self.running.pop(message.request_id, None)
            return None if known is None else SequenceOutput(request_id=message.request_id, finish_reason=FinishReason.CANCELLED)
        assert isinstance(message, Submit)
        try:
            LIMITS.refuse_if_full(message, self.load())
        except Overloaded as error:
            failure = WireFailure(error.code, error.message, True, self.load())
            return SequenceOutput(request_id=message.request_id, finish_reason=FinishReason.ERROR, failure=failure)
        self.waiting[message.request_id] = (frontend, message)
        self.most_waiting = max(self.most_waiting, len(self.waiting))
        self.most_tokens = max(self.most_tokens, self.load().waiting_prefill_tokens)
        return None

    def step(self) -> list[tuple[int, SequenceOutput]]:
        """Those that run end; others take their places, with a first token."""
        outputs = []
        for name, (frontend, _) in self.running.items():
            outputs.append((frontend, SequenceOutput(request_id=name, token_ids=[8], finish_reason=FinishReason.LENGTH)))
        self.running.clear()
        while self.waiting and len(self.running) < MAX_RUNNING:
            name = next(iter(self.waiting))
            self.running[name] = self.waiting.pop(name)
            outputs.append((self.running[name][0], SequenceOutput(request_id=name, token_ids=[7])))
        return outputs


class SharedWorkersMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.timers = Timers()
        self.original = asyncio.get_running_loop
        asyncio.get_running_loop = lambda: self.timers  # type: ignore[assignment,return-value]
        self.clock = ManualClock(1)
        self.workers = {name: Worker(WorkerId(name)) for name in ("a", "b")}
        self.to_worker: dict[tuple[int, str], deque[Message]] = {}
        self.to_frontend: dict[tuple[int, str], deque[StepOutputs]] = {}
        self.loads: dict[tuple[int, str], deque[Load]] = {}  # on the event stream, which may be slower or faster
        self.routers = [Router(RouterSettings(first_turn=number)) for number in range(3)]
        settings = FrontendSettings(migration_limit=0, admission=AdmissionSettings(max_requests=5))
        self.frontends = [Dispatcher(router, self.sender(n), Metrics(), settings, self.clock) for n, router in enumerate(self.routers)]
        self.flights: list[tuple[int, Flight]] = []
        self.cancelled: set[RequestId] = set()
        for number, (router, dispatcher) in enumerate(zip(self.routers, self.frontends, strict=True)):
            for name in self.workers:
                for lines in (self.to_worker, self.to_frontend, self.loads):
                    lines[number, name] = deque()
                dispatcher.worker_joined(WorkerId(name), EPOCH)
                router.upsert_worker(WorkerFacts(WorkerId(name), EPOCH, "m", Role.BOTH, 16, 1000, LONGEST_PROMPT, MAX_RUNNING, False))

    def sender(self, number: int) -> Any:
        return lambda worker_id, message: self.to_worker[number, worker_id].append(message)

    @rule(number=st.integers(0, 2), length=st.sampled_from([16, 48, LONGEST_PROMPT]), count=st.integers(1, 4))
    def ask(self, number: int, length: int, count: int) -> None:
        for _ in range(count):
            name = RequestId(f"r{len(self.flights)}")
            ids = [len(self.flights)] * length
            job = Job(name, 0, "m", 16, ids, sequence_hashes(ids, 16), SamplingParams(seed=1), StopConditions(max_tokens=2))
            try:
                (flight,) = self.frontends[number].start([job], Inbox())
            except Refused:
                return
            self.flights.append((number, flight))

    def deliver(self, number: int, name: str) -> None:
        answer = self.workers[name].take(number, self.to_worker[number, name].popleft())
        if answer is not None:
            self.to_frontend[number, name].append(StepOutputs(name, EPOCH, 1, [answer]))

    @precondition(lambda self: any(self.to_worker.values()))
    @rule(data=st.data())
    def a_message_arrives(self, data: st.DataObject) -> None:
        self.deliver(*data.draw(st.sampled_from([line for line, messages in self.to_worker.items() if messages])))

    @precondition(lambda self: any(self.to_frontend.values()))
    @rule(data=st.data())
    def an_answer_arrives(self, data: st.DataObject) -> None:
        number, name = data.draw(st.sampled_from([line for line, answers in self.to_frontend.items() if answers]))
        self.frontends[number].on_outputs(self.to_frontend[number, name].popleft())

    @precondition(lambda self: any(self.loads.values()))
    @rule(data=st.data(), is_lost=st.booleans())
    def a_report_arrives(self, data: st.DataObject, is_lost: bool) -> None:
        number, name = data.draw(st.sampled_from([line for line, loads in self.loads.items() if loads]))
        self.hear(number, name, is_lost=is_lost)

    def hear(self, number: int, name: str, *, is_lost: bool = False) -> None:
        load = self.loads[number, name].popleft()
        if not is_lost:
            self.routers[number].report_load(WorkerId(name), EPOCH, load)
            self.frontends[number].worker_reported(WorkerId(name))

    @rule(name=st.sampled_from(["a", "b"]))
    def step(self, name: str) -> None:
        worker = self.workers[name]
        for frontend, output in worker.step():
            self.to_frontend[frontend, name].append(StepOutputs(name, EPOCH, 1, [output]))
        for number in range(len(self.frontends)):
            self.loads[number, name].append(worker.load())

    @precondition(lambda self: self.flights)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number, flight = data.draw(st.sampled_from(self.flights))
        if not flight.is_over:
            self.cancelled.add(flight.job.sequence_id)
        self.frontends[number].cancel(flight)

    @rule(ms=st.sampled_from([100, 1500]))
    def time_passes(self, ms: int) -> None:
        self.clock.advance(ms * 1_000_000)
        for timer in [timer for timer in self.timers.pending if timer.delay_s < 1]:
            timer.fire()

    @invariant()
    def no_worker_has_more_than_it_may(self) -> None:
        for worker in self.workers.values():
            assert worker.most_waiting <= LIMITS.max_waiting_requests
            # The last one that is taken may go beyond the tokens, by its own prompt.
            assert worker.most_tokens < LIMITS.max_waiting_prefill_tokens + LONGEST_PROMPT

    @invariant()
    def bookings_live_as_long_as_their_requests(self) -> None:
        for number, router in enumerate(self.routers):
            router.bookings.check()
            placed = [flight for owner, flight in self.flights if owner == number and flight.stage in (Stage.PREFILL, Stage.SERVING)]
            assert router.bookings.total().request_count == len(placed)

    @invariant()
    def each_is_told_its_end_once(self) -> None:
        for _, flight in self.flights:
            arrivals = list(flight.inbox._arrivals.values())
            ends = [arrival.end for arrival in arrivals if arrival.end is not None]
            if flight.job.sequence_id not in self.cancelled:
                assert len(ends) == flight.is_over
                if flight.is_over and ends[0].error is None:
                    assert flight.emitted == [7, 8], "an answer without its tokens"

    def teardown(self) -> None:
        """Let everything run on: all end, and with tokens, because there is time enough."""
        try:
            for _ in range(200):
                if all(flight.is_over for _, flight in self.flights):
                    break
                for number, name in self.to_worker:
                    while self.to_worker[number, name]:
                        self.deliver(number, name)
                for name in self.workers:
                    self.step(name)
                for number, name in self.to_frontend:
                    while self.to_frontend[number, name]:
                        self.frontends[number].on_outputs(self.to_frontend[number, name].popleft())
                    while self.loads[number, name]:
                        self.hear(number, name)
                self.time_passes(100)
                self.no_worker_has_more_than_it_may()
            assert all(flight.is_over for _, flight in self.flights), "somebody waits for ever"
            self.each_is_told_its_end_once()
            assert all(dispatcher.active_count == 0 for dispatcher in self.frontends)
            assert all(router.bookings.total().is_zero() for router in self.routers)
            assert not self.timers.pending
        finally:
            asyncio.get_running_loop = self.original


TestSharedWorkers = SharedWorkersMachine.TestCase
TestSharedWorkers.settings = hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None)
