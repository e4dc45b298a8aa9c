"""The dispatcher against everything that may happen, in any order: one end per sequence, the same tokens, nothing kept."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
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
from polyphase.frontend.flight import Flight, Job, Stage
from polyphase.frontend.inbox import Inbox
from polyphase.frontend.metrics import Metrics
from polyphase.frontend.settings import FrontendSettings
from polyphase.frontend.terms import Terms
from polyphase.router import AdmissionSettings, PullRule, Router, RouterSettings, SplitRule, WorkerFacts
from polyphase.wire.cards import Role
from polyphase.wire.events import Load
from polyphase.wire.kv import EngineOffer, KvOffer, KvPart
from polyphase.wire.requests import (
    Cancel,
    FinishReason,
    HandOver,
    PullAhead,
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
    role: Role = Role.BOTH
    ahead: list[str] = field(default_factory=list)  # requests of whose blocks it was told
    asked: set[str] = field(default_factory=set)  # requests that it is to hand over


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
        self.router = Router(
            RouterSettings(split=SplitRule(min_uncached_tokens=32), max_waiting_requests=1, pull=PullRule(is_on=True, min_tokens=16))
        )
        admission = AdmissionSettings(max_requests=3, weights={"a": 2.0})
        self.settings = FrontendSettings(migration_limit=3, migration_patience_s=1, admission=admission)
        self.dispatcher = Dispatcher(self.router, self.send, Metrics(), self.settings, self.clock)
        self.lives: dict[str, Life] = {}
        self.deaf: set[str] = set()  # workers whose queue is full
        self.missed: set[str] = set()  # requests and leases whose end could not be sent
        self.flights: list[Flight] = []
        self.ended: dict[RequestId, int] = {}
        self.epoch = 0
        self.read: set[str] = set()  # leases of engines' offers that somebody may have begun to fetch
        self.begun: set[str] = set()  # requests that have got a token from their worker

    def teardown(self) -> None:
        for flight in self.flights:
            self.dispatcher.cancel(flight)
        try:
            assert self.dispatcher.active_count == 0
            assert self.router.bookings.total().is_zero()
            assert len(self.router._pulls) == 0
            assert self.timers.pending == []
            assert not self.dispatcher._sending._by_wire_id
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
                if message.holder is not None:
                    holder = self.lives[message.holder.worker_id]
                    assert message.offer is None, "what is offered need not be looked for"
                    assert message.holder.worker_id != worker_id
                    assert (message.holder.epoch, message.holder.endpoint) == (holder.epoch, f"ipc://{message.holder.worker_id}")
                life.running[message.request_id] = message
                if isinstance(message.offer, EngineOffer):
                    assert message.offer.lease_id not in self.read, "an engine's offer is good for one reader"
                    self.read.add(message.offer.lease_id)
            case Cancel(request_id):
                life.running.pop(request_id, None)
                life.leases.discard(request_id)
            case ReleaseLease(lease_id):
                life.leases.discard(lease_id)
            case HandOver(request_id):
                life.asked.add(request_id)
            case PullAhead(request_id, token_ids, part):
                assert request_id not in life.running, "it is told of blocks that it has been offered already"
                assert len(token_ids) == 16 * len(part.block_ids)
                life.ahead.append(request_id)
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
        self.dispatcher.worker_joined(WorkerId(worker_id), Epoch(self.epoch), f"ipc://{worker_id}")
        self.lives[worker_id].role = ROLES[worker_id]
        self.router.upsert_worker(self.facts(worker_id))

    def facts(self, worker_id: str) -> WorkerFacts:
        life = self.lives[worker_id]
        return WorkerFacts(WorkerId(worker_id), Epoch(life.epoch), "tiny", life.role, 16, 64, 512, 2, True)

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), count=st.integers(1, 6))
    def hold(self, data: st.DataObject, count: int) -> None:
        """A worker tells that it has the beginning of the prompts that are asked for here."""
        worker_id = data.draw(st.sampled_from(sorted(self.lives)))
        self.router.add_blocks(WorkerId(worker_id), Epoch(self.lives[worker_id].epoch), sequence_hashes([5] * 100, 16)[:count])

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), role=st.sampled_from(list(Role)), is_known=st.booleans())
    def switch_role(self, data: st.DataObject, role: Role, is_known: bool) -> None:
        """The router may hear of it now or, by another switch, later."""
        worker_id = data.draw(st.sampled_from(sorted(self.lives)))
        self.lives[worker_id].role = role
        if is_known:
            self.router.upsert_worker(self.facts(worker_id))

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), is_stalled=st.booleans())
    def stand_still_or_not(self, data: st.DataObject, is_stalled: bool) -> None:
        worker_id = data.draw(st.sampled_from(sorted(self.lives)))
        self.router.set_stalled(WorkerId(worker_id), is_stalled)
        if is_stalled:
            self.dispatcher.worker_stalled(WorkerId(worker_id), Epoch(self.lives[worker_id].epoch), "x")

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), stages=st.sets(st.sampled_from([Stage.PREFILL, Stage.SERVING])))
    def ask_to_hand_over(self, data: st.DataObject, stages: set[Stage]) -> None:
        worker_id = data.draw(st.sampled_from(sorted(self.lives)))
        self.dispatcher.ask_to_hand_over(WorkerId(worker_id), Epoch(self.lives[worker_id].epoch), stages)

    @rule(data=st.data(), has_begun=st.booleans())
    def hand_back(self, data: st.DataObject, has_begun: bool) -> None:
        """What was asked for leaves, with what is computed or with the offer that nobody has read."""
        asked = [
            (name, life, life.running[request_id])
            for name, life in sorted(self.lives.items())
            for request_id in sorted(life.asked & life.running.keys())
        ]
        if not asked:
            return
        worker_id, life, submit = data.draw(st.sampled_from(asked))
        if submit.hand_over and has_begun:
            return  # it leaves by itself
        del life.running[submit.request_id]
        offer = submit.offer
        if isinstance(offer, EngineOffer):  # its engine was told of it at once
            self.give_back(submit)
            offer = None
        if has_begun:
            if offer is not None and offer.worker_id in self.lives:
                self.lives[offer.worker_id].leases.discard(offer.lease_id)
            life.leases.add(submit.request_id)
            offer = KvOffer(worker_id, life.epoch, "x", submit.request_id, 2**62, AGENT, "pool", [0], [1], len(submit.token_ids))
        self.report(worker_id, SequenceOutput(request_id=submit.request_id, finish_reason=FinishReason.HANDED_OVER, offer=offer))

    @rule(data=st.data(), code=st.sampled_from(["overloaded", "draining", "role_changed"]))
    def refuse(self, data: st.DataObject, code: str) -> None:
        """In the first answer; an offer that came along stays the frontend's."""
        chosen = self.some_running(data)
        if chosen is None:
            return
        worker_id, submit = chosen
        if submit.request_id in self.begun:
            return
        del self.lives[worker_id].running[submit.request_id]
        self.note_unread(submit)
        failure = WireFailure(code, "x", True)
        self.report(worker_id, SequenceOutput(request_id=submit.request_id, finish_reason=FinishReason.ERROR, failure=failure))

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

    @rule(
        length=st.sampled_from([3, 100]),
        count=st.sampled_from([1, 1, 1, 3]),
        priority=st.integers(0, 1),
        tenant=st.sampled_from(["a", "b"]),
        patience_s=st.sampled_from([1, 30]),
    )
    def start(self, length: int, count: int, priority: int, tenant: str, patience_s: int) -> None:
        """Sequences of one request; their arrivals are told apart by index."""
        ids = [5] * length
        sampling, stop, hashes = SamplingParams(seed=1), StopConditions(max_tokens=MAX_TOKENS), sequence_hashes(ids, 16)
        first = len(self.flights)
        names = [RequestId(f"r{first + number}") for number in range(count)]
        jobs = [Job(name, number, "tiny", 16, ids, hashes, sampling, stop, priority=priority) for number, name in enumerate(names)]
        now_ns = self.clock.now_ns()
        terms = Terms(tenant, now_ns + 600 * 10**9, now_ns + patience_s * 10**9)
        before = self.dispatcher.active_count
        submitted = {name for life in self.lives.values() for name in life.running}
        try:
            self.flights += self.dispatcher.start(jobs, Inbox(), terms)
        except Refused:
            assert self.dispatcher.active_count == before, "nothing is left of what was refused"
            left = {name for life in self.lives.values() for name in life.running} - submitted
            assert not left, "it was refused, and part of it was sent"
            return

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), waiting=st.sampled_from([0, 0, 5]))
    def load_report(self, data: st.DataObject, waiting: int) -> None:
        worker_id = data.draw(st.sampled_from(sorted(self.lives)))
        life = self.lives[worker_id]
        load = Load(running_count=len(life.running), waiting_count=waiting, block_count=64)
        self.router.report_load(WorkerId(worker_id), Epoch(life.epoch), load)
        self.dispatcher.worker_reported(WorkerId(worker_id))

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def send_back(self, data: st.DataObject) -> None:
        """A worker is full, and says so in its first answer."""
        chosen = self.some_running(data)
        if chosen is None or len(chosen[1].token_ids) > chosen[1].prompt_token_count:
            return
        worker_id, submit = chosen
        del self.lives[worker_id].running[submit.request_id]
        self.note_unread(submit)
        failure = WireFailure("overloaded", "full", True, Load(running_count=2, waiting_count=9, block_count=64))
        self.report(worker_id, SequenceOutput(request_id=submit.request_id, finish_reason=FinishReason.ERROR, failure=failure))

    def note_unread(self, submit: Submit) -> None:
        if submit.offer is not None:
            self.read.discard(submit.offer.lease_id)

    def give_back(self, submit: Submit) -> None:
        if submit.offer is not None and submit.offer.worker_id in self.lives:
            self.lives[submit.offer.worker_id].leases.discard(submit.offer.lease_id)

    @rule(data=st.data())
    def compute_for_an_engine_of_its_kind(self, data: st.DataObject) -> None:
        """An engine that moves KV itself: its offer comes without a token, perhaps before the prompt is computed."""
        running = [(name, submit) for name, life in sorted(self.lives.items()) for submit in life.running.values() if submit.hand_over]
        if not running:
            return
        worker_id, submit = data.draw(st.sampled_from(running))
        life = self.lives[worker_id]
        del life.running[submit.request_id]
        life.leases.add(submit.request_id)
        offer = EngineOffer(worker_id, life.epoch, "x", submit.request_id, 2**62, "kind/1", {"room": 7}, len(submit.token_ids))
        self.report(worker_id, SequenceOutput(request_id=submit.request_id, finish_reason=FinishReason.HANDED_OVER, offer=offer))

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
        self.give_back(submit)
        del life.running[submit.request_id]
        self.begun.add(submit.request_id)
        if finish is None:
            continued = [*submit.token_ids, *ids]
            fields = {name: getattr(submit, name) for name in submit.__struct_fields__}
            life.running[submit.request_id] = Submit(**{**fields, "token_ids": continued, "offer": None})
        self.report(worker_id, SequenceOutput(request_id=submit.request_id, token_ids=ids, finish_reason=finish, offer=offer))

    @rule(data=st.data(), first_block=st.integers(0, 4))
    def tell_of_blocks(self, data: st.DataObject, first_block: int) -> None:
        """While a prompt is computed; whoever is to take it over hears of it, and nothing else changes."""
        chosen = self.some_running(data)
        if chosen is None or not chosen[1].with_parts:
            return
        worker_id, submit = chosen
        heard = {name: len(life.ahead) for name, life in self.lives.items()}
        self.tell(worker_id, submit.request_id, first_block)
        others = [name for name, life in self.lives.items() if len(life.ahead) > heard[name]]
        assert worker_id not in others
        assert len(others) <= 1

    def tell(self, worker_id: str, request_id: str, first_block: int = 0) -> None:
        part = KvPart(first_block, [7, 8], [1, 1], AGENT, "pool")
        self.report(worker_id, SequenceOutput(request_id=request_id, part=part))

    @rule(data=st.data(), code=st.sampled_from(["engine_failed", "peer_lost"]), is_retryable=st.booleans(), gives_up=st.booleans())
    def fail(self, data: st.DataObject, code: str, is_retryable: bool, gives_up: bool) -> None:
        chosen = self.some_running(data)
        if chosen is None:
            return
        worker_id, submit = chosen
        del self.lives[worker_id].running[submit.request_id]
        if submit.offer is not None and submit.offer.worker_id in self.lives and not gives_up:
            self.lives[submit.offer.worker_id].leases.discard(submit.offer.lease_id)
        reason = FinishReason.CANCELLED if gives_up else FinishReason.ERROR
        failure = None if gives_up else WireFailure(code, "x", is_retryable)
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
            arrivals = {index: one for index, one in flight.inbox._arrivals.items() if index == flight.job.index}
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
    def who_waits_is_known_to_wait(self) -> None:
        room = self.dispatcher.waiting_room
        waiting = [flight for flight in self.flights if flight.party is not None]
        stranded = self.dispatcher._waiting.stranded
        assert all(len(lane.queue) <= 3 for lane in room._lanes.values()), "each queue has its limit"
        assert all(flight.stage is Stage.WAITING for flight in waiting + stranded)
        assert len({id(flight.party) for flight in waiting}) == len(room)
        for flight in self.flights:
            is_waiting = (flight in waiting) + (flight in stranded)
            assert is_waiting == (flight.stage is Stage.WAITING), flight
        assert bool(waiting or stranded) == self.dispatcher._waiting.is_watched, "the timer runs only while something waits"
        self.router.bookings.check()

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


@contextlib.contextmanager
def machine() -> Iterator[DispatchMachine]:
    """Driven by hand; at its end everything is cancelled, and nothing may be left."""
    one = DispatchMachine()
    try:
        yield one
    finally:
        one.teardown()


def test_what_could_not_be_sent_to_a_worker_is_not_lost_with_it() -> None:
    """It waits in the queue by then, and is not broken off as well."""
    with machine() as one:
        one.join("prefill-0")
        one.start(length=3, count=3, priority=0, tenant="a", patience_s=30)
        one.join("prefill-1")
        one.deaf.add("prefill-1")
        one.start(length=3, count=1, priority=0, tenant="a", patience_s=30)
        waiting = one.flights[-1]
        life = one.lives.pop("prefill-1")
        one.router.remove_worker(WorkerId("prefill-1"))
        one.dispatcher.worker_lost(WorkerId("prefill-1"), Epoch(life.epoch))
        assert waiting.party is not None
        assert not one.dispatcher._waiting.stranded
        assert waiting.record.migrations == 0


def test_what_strands_at_its_start_is_watched() -> None:
    """There is room for the first of three sequences; the others have been promised as much, and a timer sees to it."""
    with machine() as one:
        one.join("prefill-0")
        one.start(length=3, count=1, priority=0, tenant="a", patience_s=30)
        one.start(length=3, count=3, priority=0, tenant="a", patience_s=30)
        assert one.dispatcher._waiting.stranded
        assert one.dispatcher._waiting.is_watched


def test_what_a_stalled_worker_or_a_broken_connection_strands_is_watched() -> None:
    for breaks in ("worker_stalled", "connection_lost"):
        with machine() as one:
            one.join("prefill-0")
            one.start(length=3, count=1, priority=0, tenant="a", patience_s=30)
            one.deaf.add("prefill-0")
            reason = ("no step for a while",) if breaks == "worker_stalled" else ()
            getattr(one.dispatcher, breaks)(WorkerId("prefill-0"), Epoch(one.lives["prefill-0"].epoch), *reason)
            assert one.dispatcher._waiting.stranded
            assert one.dispatcher._waiting.is_watched
            one.lives["prefill-0"].running.clear()  # what it ran before nobody could tell it to stop


def test_a_worker_whose_peer_was_lost_is_taken_again_if_there_is_no_other() -> None:
    """An engine that waited for KV in vain is well; but it is not asked for ever."""
    for code, is_taken_again in (("peer_lost", True), ("engine_failed", False)):
        with machine() as one:
            one.join("both-0")
            one.start(length=3, count=1, priority=0, tenant="a", patience_s=30)
            for _ in range(10):
                running = one.lives["both-0"].running
                if not running:
                    break
                wire_id = running.popitem()[0]
                failure = WireFailure(code, "x", True)
                one.report("both-0", SequenceOutput(request_id=wire_id, finish_reason=FinishReason.ERROR, failure=failure))
                for timer in [timer for timer in one.timers.pending if timer.delay_s < 1]:  # who waits looks again
                    timer.fire()
            record = one.flights[0].record
            assert (record.migrations > 1) is is_taken_again, (code, record.migrations)
            assert one.flights[0].is_over


def test_whoever_takes_a_prompt_over_hears_of_its_blocks_while_it_is_computed() -> None:
    with machine() as one:
        one.join("prefill-0")
        one.join("decode-0")
        one.start(length=100, count=1, priority=0, tenant="a", patience_s=30)
        one.tell("prefill-0", "r0")
        one.tell("prefill-0", "r0", first_block=2)
        assert one.lives["decode-0"].ahead == ["r0", "r0"]
        assert one.flights[0].stage is Stage.PREFILL
        one.dispatcher.cancel(one.flights[0])
        one.tell("prefill-0", "r0", first_block=4)
        assert one.lives["decode-0"].ahead == ["r0", "r0"]


def test_whoever_stood_still_and_is_well_again_goes_on_when_nobody_else_is_left() -> None:
    with machine() as one:
        one.join("prefill-0")
        one.start(length=3, count=1, priority=0, tenant="a", patience_s=30)
        [flight] = one.flights
        one.join("prefill-1")
        first, second = one.lives["prefill-0"], one.lives["prefill-1"]
        one.router.set_stalled(WorkerId("prefill-0"), True)
        one.dispatcher.worker_stalled(WorkerId("prefill-0"), Epoch(first.epoch), "no step for a while")
        assert flight.worker_id == "prefill-1"
        one.router.set_stalled(WorkerId("prefill-0"), False)
        second.running.clear()
        one.router.remove_worker(WorkerId("prefill-1"))
        del one.lives["prefill-1"]
        one.dispatcher.worker_lost(WorkerId("prefill-1"), Epoch(second.epoch))
        assert (flight.worker_id, flight.stage) == ("prefill-0", Stage.SERVING)
        one.dispatcher.cancel(flight)
