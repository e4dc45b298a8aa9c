"""The dispatcher against everything that may happen, in any order: one end per sequence, the same tokens, nothing kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from polyphase.core.clock import ManualClock
from polyphase.core.errors import Refused, WorkerLost
from polyphase.core.hashing import sequence_hashes
from polyphase.core.ids import Epoch, RequestId, WorkerId
from polyphase.frontend.dispatch import Dispatcher
from polyphase.frontend.flight import Flight, Job
from polyphase.frontend.inbox import Inbox
from polyphase.frontend.metrics import Metrics
from polyphase.frontend.settings import FrontendSettings
from polyphase.router import Router, RouterSettings, SplitRule, WorkerFacts
from polyphase.wire.cards import Role
from polyphase.wire.kv import KvOffer
from polyphase.wire.requests import (
    Cancel,
    FinishReason,
    ReleaseLease,
    SamplingParams,
    SequenceOutput,
    StepOutputs,
    StopConditions,
    Submit,
    ToWorker,
    WireFailure,
)
from polyphase.wire.transfer import AgentCard, RegionCard

AGENT = AgentCard("p", 1, "host", 0, "/nowhere", "", False, [], [RegionCard("pool", "host", 8, 1024, [])])
ROLES = {"prefill-0": Role.PREFILL, "prefill-1": Role.PREFILL, "decode-0": Role.DECODE, "both-0": Role.BOTH}
MAX_TOKENS = 6


@dataclass
class Life:
    """One life of a worker, as the test plays it."""

    epoch: int
    running: dict[str, Submit] = field(default_factory=dict)
    leases: set[str] = field(default_factory=set)


class Timers:
    """Stands in for the event loop's `call_later`; fires when told."""

    def __init__(self) -> None:
        self.pending: list[Timer] = []

    def call_later(self, delay_s: float, function: Callable[..., None], *args: Any) -> Timer:
        timer = Timer(self, delay_s, function, args)
        self.pending.append(timer)
        return timer


@dataclass(eq=False)
class Timer:
    timers: Timers
    delay_s: float
    function: Callable[..., None]
    args: tuple[Any, ...]

    def cancel(self) -> None:
        if self in self.timers.pending:
            self.timers.pending.remove(self)

    def fire(self) -> None:
        self.cancel()
        self.function(*self.args)


class DispatchMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.timers = Timers()
        self.original = asyncio.get_running_loop
        asyncio.get_running_loop = lambda: self.timers  # type: ignore[assignment,return-value]
        self.clock = ManualClock(1)
        self.router = Router(RouterSettings(split=SplitRule(min_uncached_tokens=32), max_waiting_requests=1))
        self.settings = FrontendSettings(migration_limit=3, migration_patience_s=1)
        self.dispatcher = Dispatcher(self.router, self.send, Metrics(), self.settings, self.clock)
        self.lives: dict[str, Life] = {}
        self.deaf: set[str] = set()  # workers whose queue is full
        self.missed: set[str] = set()  # requests and leases whose end could not be sent
        self.flights: list[Flight] = []
        self.ended: dict[RequestId, int] = {}
        self.epoch = 0

    def teardown(self) -> None:
        for flight in self.flights:
            self.dispatcher.cancel(flight)
        try:
            assert self.dispatcher.active_count == 0
            assert self.router.bookings.total().is_zero()
            assert self.timers.pending == []
            assert not self.dispatcher._by_wire_id
            assert all(not life.running.keys() - self.missed for life in self.lives.values())
        finally:
            asyncio.get_running_loop = self.original

    def send(self, worker_id: str, message: ToWorker) -> None:
        life = self.lives.get(worker_id)
        if life is None or worker_id in self.deaf:
            if isinstance(message, Cancel):
                self.missed.add(message.request_id)
            if isinstance(message, ReleaseLease):
                self.missed.add(message.lease_id)
            raise WorkerLost(f"{worker_id} is deaf")
        match message:
            case Submit():
                assert message.request_id not in life.running
                life.running[message.request_id] = message
            case Cancel(request_id):
                life.running.pop(request_id, None)
                life.leases.discard(request_id)
            case ReleaseLease(lease_id):
                life.leases.discard(lease_id)
            case _:
                raise AssertionError(message)

    def report(self, worker_id: str, output: SequenceOutput, epoch: int | None = None) -> None:
        life = self.lives[worker_id]
        self.dispatcher.on_outputs(StepOutputs(worker_id, life.epoch if epoch is None else epoch, 1, [output]))

    @rule(worker_id=st.sampled_from(list(ROLES)))
    def join(self, worker_id: str) -> None:
        if worker_id in self.lives:
            return
        self.epoch += 1
        self.lives[worker_id] = Life(self.epoch)
        self.dispatcher.worker_joined(WorkerId(worker_id), Epoch(self.epoch))
        self.router.upsert_worker(WorkerFacts(WorkerId(worker_id), Epoch(self.epoch), "tiny", ROLES[worker_id], 16, 64, 512, 2, True))

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        worker_id = data.draw(st.sampled_from(sorted(self.lives)))
        life = self.lives.pop(worker_id)
        self.deaf.discard(worker_id)
        self.router.remove_worker(WorkerId(worker_id))
        self.dispatcher.worker_lost(WorkerId(worker_id), Epoch(life.epoch))

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def turn_deaf_or_not(self, data: st.DataObject) -> None:
        self.deaf ^= {data.draw(st.sampled_from(sorted(self.lives)))}

    @rule(length=st.sampled_from([3, 100]))
    def start(self, length: int) -> None:
        ids = [5] * length
        name = RequestId(f"r{len(self.flights)}")
        job = Job(name, 0, "tiny", 16, ids, sequence_hashes(ids, 16), SamplingParams(seed=1), StopConditions(max_tokens=MAX_TOKENS))
        try:
            self.flights.append(self.dispatcher.start(job, Inbox()))
        except Refused:
            return

    def some_running(self, data: st.DataObject) -> tuple[str, Submit] | None:
        running = [(name, submit) for name, life in sorted(self.lives.items()) for submit in life.running.values()]
        return data.draw(st.sampled_from(running)) if running else None

    @rule(data=st.data(), count=st.integers(1, 3))
    def step(self, data: st.DataObject, count: int) -> None:
        """A worker makes tokens: the next ones after those it was given."""
        chosen = self.some_running(data)
        if chosen is None:
            return
        worker_id, submit = chosen
        life = self.lives[worker_id]
        done = len(submit.token_ids) - submit.prompt_token_count
        ids = list(range(done, min(done + (1 if submit.hand_over else count), MAX_TOKENS)))
        assert ids, "a worker was given a finished sequence"
        assert submit.token_ids[submit.prompt_token_count :] == list(range(done)), "tokens were lost or repeated on the way"
        finish = FinishReason.LENGTH if done + len(ids) == MAX_TOKENS else None
        offer = None
        if finish is None and submit.hand_over:
            finish = FinishReason.HANDED_OVER
            lease_id = submit.request_id
            life.leases.add(lease_id)
            offer = KvOffer(worker_id, life.epoch, "x", lease_id, 2**62, AGENT, "pool", [0], [1], len(submit.token_ids))
        if submit.offer is not None and submit.offer.worker_id in self.lives:
            self.lives[submit.offer.worker_id].leases.discard(submit.offer.lease_id)
        del life.running[submit.request_id]
        if finish is None:
            continued = [*submit.token_ids, *ids]
            fields = {name: getattr(submit, name) for name in submit.__struct_fields__}
            life.running[submit.request_id] = Submit(**{**fields, "token_ids": continued, "offer": None})
        self.report(worker_id, SequenceOutput(request_id=submit.request_id, token_ids=ids, finish_reason=finish, offer=offer))

    @rule(data=st.data(), is_retryable=st.booleans(), gives_up=st.booleans())
    def fail(self, data: st.DataObject, is_retryable: bool, gives_up: bool) -> None:
        chosen = self.some_running(data)
        if chosen is None:
            return
        worker_id, submit = chosen
        del self.lives[worker_id].running[submit.request_id]
        if submit.offer is not None and submit.offer.worker_id in self.lives and not gives_up:
            self.lives[submit.offer.worker_id].leases.discard(submit.offer.lease_id)
        reason = FinishReason.CANCELLED if gives_up else FinishReason.ERROR
        failure = None if gives_up else WireFailure("engine_failed", "x", is_retryable)
        self.report(worker_id, SequenceOutput(request_id=submit.request_id, finish_reason=reason, failure=failure))

    @precondition(lambda self: self.flights)
    @rule(data=st.data())
    def stale_news(self, data: st.DataObject) -> None:
        """Outputs of an earlier life, of a worker that no longer has it, or of an unknown request change nothing."""
        flight = data.draw(st.sampled_from(self.flights))
        before = list(flight.emitted)
        output = SequenceOutput(request_id=flight.wire_id, token_ids=[99])
        self.dispatcher.on_outputs(StepOutputs(flight.worker_id, flight.epoch - 1, 1, [output]))
        self.dispatcher.on_outputs(StepOutputs("stranger", flight.epoch, 1, [output]))
        assert flight.emitted == before

    @precondition(lambda self: self.flights)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        flight = data.draw(st.sampled_from(self.flights))
        was_over = flight.is_over
        self.dispatcher.cancel(flight)
        assert flight.is_over
        if not was_over:
            self.ended[flight.job.sequence_id] = 0

    @precondition(lambda self: self.timers.pending)
    @rule(data=st.data(), seconds=st.sampled_from([0.1, 2.0]))
    def time_passes(self, data: st.DataObject, seconds: float) -> None:
        self.clock.advance(int(seconds * 1e9))
        short = [timer for timer in self.timers.pending if timer.delay_s < 1]
        if short:
            data.draw(st.sampled_from(short)).fire()

    @precondition(lambda self: self.timers.pending)
    @rule(data=st.data())
    def deadline(self, data: st.DataObject) -> None:
        long = [timer for timer in self.timers.pending if timer.delay_s > 1]
        if long:
            data.draw(st.sampled_from(long)).fire()

    @invariant()
    def each_sequence_is_told_its_end_once(self) -> None:
        for flight in self.flights:
            arrivals = flight.inbox._arrivals
            ends = sum(arrival.end is not None for arrival in arrivals.values())
            cancelled = flight.job.sequence_id in self.ended
            if not cancelled:
                assert ends == int(flight.is_over)
            assert flight.emitted == list(range(len(flight.emitted)))
            delivered = [i for arrival in arrivals.values() for i in arrival.token_ids]
            assert delivered == flight.emitted

    @invariant()
    def only_open_flights_are_booked(self) -> None:
        open_count = sum(not flight.is_over for flight in self.flights)
        assert self.dispatcher.active_count == open_count
        if not open_count:
            assert self.router.bookings.total().is_zero()

    @invariant()
    def no_worker_works_for_nobody(self) -> None:
        open_ids = {flight.wire_id for flight in self.flights if not flight.is_over}
        for worker_id, life in self.lives.items():
            if worker_id not in self.deaf:
                assert not (life.running.keys() - open_ids - self.missed), f"{worker_id} runs what nobody waits for"

    @invariant()
    def no_lease_is_kept_for_nobody(self) -> None:
        wanted = {flight.offer.lease_id for flight in self.flights if flight.offer is not None and not flight.is_over}
        for worker_id, life in self.lives.items():
            assert not life.leases - wanted - self.missed, f"{worker_id} keeps blocks that nobody will take"


TestDispatch = DispatchMachine.TestCase
TestDispatch.settings = hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None)
