"""Several frontends that know nothing of each other share workers: each worker alone decides what it takes, and nobody overloads it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from polyphase.core.errors import Busier, NoWorkers, Overloaded
from polyphase.core.hashing import sequence_hashes
from polyphase.core.ids import Epoch, RequestId, WorkerId
from polyphase.frontend.dispatch import Dispatcher
from polyphase.frontend.flight import Flight, Job
from polyphase.frontend.hints import NO_HINTS, RoutingHints
from polyphase.frontend.inbox import Inbox
from polyphase.frontend.metrics import Metrics
from polyphase.frontend.settings import FrontendSettings
from polyphase.router import Refusals, Router, RouteRequest, RouterSettings, WorkerFacts
from polyphase.router.refusals import CHOICES
from polyphase.wire.cards import Role
from polyphase.wire.events import Load
from polyphase.wire.requests import Cancel, FinishReason, SamplingParams, SequenceOutput, StepOutputs, StopConditions, Submit, WireFailure
from polyphase.wire.requests import ToWorker as Message
from polyphase.worker.room import QueueLimits

from .stack import wait_for

PROMPT_TOKENS = 64


@dataclass
class SharedWorker:
    """Answers on the next turn of the loop, as a process of its own does; takes what its limits allow."""

    worker_id: str
    limits: QueueLimits
    epoch: int = 1
    waiting: dict[str, tuple[Dispatcher, Submit]] = field(default_factory=dict)
    most: int = 0
    refused: int = 0
    told: list[int | None] = field(default_factory=list)

    def load(self) -> Load:
        return Load(waiting_count=len(self.waiting), waiting_prefill_tokens=PROMPT_TOKENS * len(self.waiting), block_count=1000)

    def take(self, dispatcher: Dispatcher, message: Message) -> None:
        if isinstance(message, Cancel):
            self.waiting.pop(message.request_id, None)
        if not isinstance(message, Submit):
            return
        try:
            self.limits.refuse_if_full(message, self.load())
        except Exception as error:  # noqa: BLE001
            self.refused += 1
            failure = WireFailure("overloaded", str(error), True, self.load())
            self.tell(dispatcher, SequenceOutput(request_id=message.request_id, finish_reason=FinishReason.ERROR, failure=failure))
            return
        self.waiting[message.request_id] = (dispatcher, message)
        self.most = max(self.most, len(self.waiting))

    def finish_one(self) -> None:
        dispatcher, submit = self.waiting.pop(next(iter(self.waiting)))
        self.tell(dispatcher, SequenceOutput(request_id=submit.request_id, token_ids=[1], finish_reason=FinishReason.LENGTH))

    def tell(self, dispatcher: Dispatcher, output: SequenceOutput) -> None:
        asyncio.get_running_loop().call_soon(dispatcher.on_outputs, StepOutputs(self.worker_id, self.epoch, 1, [output]))


class Frontend:
    def __init__(self, name: str, workers: dict[str, SharedWorker], settings: FrontendSettings) -> None:
        self.name = name
        self.router = Router(RouterSettings())
        self.metrics = Metrics()
        self.dispatcher = Dispatcher(self.router, self.send, self.metrics, settings)
        self.workers = workers
        self.flights: list[Flight] = []
        for worker in workers.values():
            self.dispatcher.worker_joined(WorkerId(worker.worker_id), Epoch(worker.epoch))
            self.router.upsert_worker(WorkerFacts(WorkerId(worker.worker_id), Epoch(worker.epoch), "m", Role.BOTH, 16, 1000, 512, 8, False))

    def send(self, worker_id: str, message: Message) -> None:
        self.workers[worker_id].take(self.dispatcher, message)

    def start(self, hints: RoutingHints = NO_HINTS) -> Flight:
        ids = [len(self.flights)] * PROMPT_TOKENS
        name = RequestId(f"{self.name}-{len(self.flights)}")
        hashes, stop = sequence_hashes(ids, 16), StopConditions(max_tokens=1)
        job = Job(name, 0, "m", 16, ids, hashes, SamplingParams(seed=1), stop, hints=hints)
        self.flights += self.dispatcher.start([job], Inbox())
        return self.flights[-1]

    def refusals(self, worker_id: str) -> float:
        return self.metrics.registry.get_sample_value("polyphase_router_worker_refusals_total", {"worker": worker_id}) or 0.0


@pytest.fixture
def settings() -> FrontendSettings:
    return FrontendSettings(migration_limit=0, migration_patience_s=20)


async def test_two_frontends_do_not_overload_one_worker(settings: FrontendSettings) -> None:
    """With no migration allowed at all: a refusal is none."""
    limits = QueueLimits(max_waiting_requests=100, max_waiting_prefill_tokens=3 * PROMPT_TOKENS)
    workers = {name: SharedWorker(name, limits) for name in ("a", "b")}
    frontends = [Frontend(name, workers, settings) for name in ("f", "g")]
    # Each believes that all its requests are alone: without the worker's word they would put six on each.
    for _ in range(3):
        for frontend in frontends:
            frontend.start()
    await wait_for(lambda: sum(len(worker.waiting) for worker in workers.values()) == 6)
    for _ in range(2):
        for frontend in frontends:
            frontend.start()
    flights = [flight for frontend in frontends for flight in frontend.flights]
    for done in range(len(flights)):
        await wait_for(lambda: any(worker.waiting for worker in workers.values()))
        assert all(worker.most <= 3 for worker in workers.values()), done
        max(workers.values(), key=lambda worker: len(worker.waiting)).finish_one()
    await wait_for(lambda: all(flight.is_over for flight in flights))
    assert all(flight.record.completion_tokens == 1 and flight.record.migrations == 0 for flight in flights)
    assert all(frontend.router.bookings.total().is_zero() for frontend in frontends)
    assert sum(worker.refused for worker in workers.values()) >= 1
    told = sum(frontend.refusals(name) for frontend in frontends for name in workers)
    assert told == sum(worker.refused for worker in workers.values())


async def test_a_refusal_brings_the_true_load(settings: FrontendSettings) -> None:
    """What one frontend learns by a refusal keeps its next requests away, until the worker reports another load."""
    limits = QueueLimits(max_waiting_requests=100, max_waiting_prefill_tokens=PROMPT_TOKENS)
    workers = {"a": SharedWorker("a", limits), "b": SharedWorker("b", QueueLimits(100, 10**6))}
    first, second = (Frontend(name, workers, settings) for name in ("f", "g"))
    filler = first.start()
    full = workers[filler.worker_id]
    other = workers["b" if full.worker_id == "a" else "a"]
    full.limits, other.limits = limits, QueueLimits(100, 10**6)
    for _ in range(4):
        flight = second.start()
        await wait_for(lambda flight=flight: flight.worker_id == other.worker_id)  # type: ignore[misc]
    assert full.refused == 1
    (view,) = [view for view in second.router.workers() if view.facts.worker_id == full.worker_id]
    assert view.load == full.load()
    events = [moment.event for flight in second.flights for moment in flight.record.history.moments]
    assert events.count("refused") == 1
    for flight in (filler, *second.flights):
        (first if flight is filler else second).dispatcher.cancel(flight)
    assert second.router.bookings.total().is_zero()


async def test_what_was_refused_waits_for_room_and_not_for_the_next_refusal(settings: FrontendSettings) -> None:
    """A burst at three frontends for one worker: what it refuses does not go to and fro with each of its reports."""
    worker = SharedWorker("w", QueueLimits(max_waiting_requests=9, max_waiting_prefill_tokens=10**6))
    frontends = [Frontend(name, {"w": worker}, settings) for name in ("f", "g", "h")]
    flights = [frontend.start() for _ in range(20) for frontend in frontends]
    for _ in flights:
        for _ in range(4):  # an engine's steps
            for frontend in frontends:
                frontend.router.report_load(WorkerId("w"), Epoch(1), worker.load())
                frontend.dispatcher.worker_reported(WorkerId("w"))
            await asyncio.sleep(0)
        await wait_for(lambda: worker.waiting)
        worker.finish_one()
        await asyncio.sleep(0)
    await wait_for(lambda: all(flight.is_over for flight in flights))
    assert all(flight.record.completion_tokens == 1 for flight in flights)
    assert worker.refused <= 8 * len(flights)


async def test_nothing_is_sent_to_the_busy_because_the_others_have_refused(settings: FrontendSettings) -> None:
    """One worker is saturated, and one has just refused: a fresh request waits in the queue, as if both were."""
    workers = {"busy": SharedWorker("busy", QueueLimits(100, 10**6)), "full": SharedWorker("full", QueueLimits(0, 10**6))}
    frontend = Frontend("f", workers, settings)
    frontend.router.report_load(
        WorkerId("busy"), Epoch(1), Load(running_count=9, waiting_count=99, waiting_prefill_tokens=5000, block_count=1000)
    )
    refused = frontend.start()
    await wait_for(lambda: workers["full"].refused)
    await asyncio.sleep(0)
    others = [frontend.start() for _ in range(3)]
    assert [flight.party is not None for flight in others] == [True] * 3
    assert not [flight for flight in others if flight.attempts]
    for flight in (refused, *others):
        frontend.dispatcher.cancel(flight)
    assert frontend.router.bookings.total().is_zero()


async def test_who_is_refused_holds_up_only_those_that_wait_for_the_same_workers(settings: FrontendSettings) -> None:
    """It insists on a worker in zone x, which is full; others need not wait behind it when one elsewhere has room."""
    workers = {"x": SharedWorker("x", QueueLimits(0, 10**6)), "y": SharedWorker("y", QueueLimits(100, 10**6))}
    frontend = Frontend("f", workers, settings)
    x, y = (view.facts for view in frontend.router.workers())
    frontend.router.upsert_worker(replace(x, labels={"zone": "x"}))
    for name in workers:
        frontend.router.report_load(WorkerId(name), Epoch(1), Load(running_count=9, waiting_count=9, block_count=1000))
    ordinary = frontend.start()
    assert ordinary.party is not None
    frontend.router.report_load(WorkerId("x"), Epoch(1), Load(block_count=1000))
    held = frontend.start(RoutingHints(required_labels={"zone": "x"}))
    await wait_for(lambda: workers["x"].refused)
    frontend.router.report_load(WorkerId("y"), Epoch(1), Load(block_count=1000))
    frontend.dispatcher.worker_reported(WorkerId("y"))
    assert ordinary.worker_id == y.worker_id
    assert held.attempts >= 1
    for flight in (ordinary, held):
        frontend.dispatcher.cancel(flight)


def test_full_workers_do_not_hide_that_no_worker_is_there() -> None:
    """What one model's workers refused says nothing of another model, whose last worker is gone."""
    router, refusals = Router(RouterSettings()), Refusals()
    router.upsert_worker(WorkerFacts(WorkerId("a"), Epoch(1), "m", Role.BOTH, 16, 1000, 512, 8, False))
    refusals.note(WorkerId("a"), Overloaded.code, 0)
    with pytest.raises(Overloaded, match="refused by a a moment ago"):
        refusals.route(router.route, RouteRequest(RequestId("r"), "m", [], 1, 1), 1, router.has_headroom)
    with pytest.raises(NoWorkers):
        refusals.route(router.route, RouteRequest(RequestId("r"), "other", [], 1, 1), 1, router.has_headroom)
    assert router.bookings.total().is_zero()


def test_limits_of_a_worker() -> None:
    limits = QueueLimits.of_engine(max_batch_tokens=512, max_waiting_requests=3, max_waiting_prefill_tokens=None)
    assert limits.max_waiting_prefill_tokens == 16 * 512
    submit = Submit(
        request_id="r", token_ids=[1, 2], prompt_token_count=2, sampling=SamplingParams(seed=1), stop=StopConditions(max_tokens=1)
    )
    migrated = Submit(
        request_id="r", token_ids=[1, 2], prompt_token_count=1, sampling=SamplingParams(seed=1), stop=StopConditions(max_tokens=2)
    )
    limits.refuse_if_full(submit, Load(waiting_count=2, waiting_prefill_tokens=8191))
    limits.refuse_if_full(migrated, Load(waiting_count=2, waiting_prefill_tokens=9999))
    with pytest.raises(Exception, match="8192 prompt tokens wait"):
        limits.refuse_if_full(submit, Load(waiting_prefill_tokens=8192))
    with pytest.raises(Exception, match="3 requests wait"):
        limits.refuse_if_full(migrated, Load(waiting_count=3))


def test_a_worker_is_not_busier_than_it_was_chosen_for() -> None:
    limits = QueueLimits.of_engine(max_batch_tokens=512, max_waiting_requests=3, max_waiting_prefill_tokens=None)

    def sent(believed: int | None, tokens: int = 2) -> Submit:
        return Submit(
            request_id="r",
            token_ids=[1] * tokens,
            prompt_token_count=2,
            sampling=SamplingParams(seed=1),
            stop=StopConditions(max_tokens=9),
            believed_prefill_tokens=believed,
        )

    limits.refuse_if_full(sent(1000), Load(waiting_prefill_tokens=1128))
    with pytest.raises(Busier, match="1129 prompt tokens wait for this worker; it was chosen when 1000 were known of"):
        limits.refuse_if_full(sent(1000), Load(waiting_prefill_tokens=1129))
    limits.refuse_if_full(sent(None), Load(waiting_prefill_tokens=5000))  # it was sent in spite of that
    limits.refuse_if_full(sent(0, tokens=3), Load(waiting_prefill_tokens=5000))  # it migrates


class AlwaysBusier(SharedWorker):
    """Whatever a router believes, more waits here."""

    def take(self, dispatcher: Dispatcher, message: Message) -> None:
        assert isinstance(message, Submit)
        self.told.append(message.believed_prefill_tokens)
        output = SequenceOutput(request_id=message.request_id, token_ids=[1], finish_reason=FinishReason.LENGTH)
        if message.believed_prefill_tokens is not None:
            load = Load(waiting_prefill_tokens=1000 * len(self.told), block_count=1000)
            failure = WireFailure(Busier.code, "busier", True, load)
            output = SequenceOutput(request_id=message.request_id, finish_reason=FinishReason.ERROR, failure=failure)
        self.tell(dispatcher, output)


async def test_a_request_is_taken_at_last_by_a_worker_that_is_always_busier(settings: FrontendSettings) -> None:
    """The same worker may be chosen again, now that its load is known; and no more often than a few times."""
    worker = AlwaysBusier("w", QueueLimits(100, 100_000))
    frontend = Frontend("f", {"w": worker}, settings)
    flight = frontend.start()
    await wait_for(lambda: flight.is_over)
    assert worker.told == [*(1000 * place for place in range(CHOICES)), None]
    assert flight.record.migrations == 0
    assert frontend.refusals("w") == CHOICES
    assert frontend.router.bookings.total().is_zero()
