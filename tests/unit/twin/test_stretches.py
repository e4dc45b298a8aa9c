"""Random loads: the same outcome with steps leapt over as one by one, and nothing lost or left behind, by checkers of their own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from polyphase.engines.mock import MockSettings
from polyphase.launch.model_source import resolve_model
from polyphase.router import Router
from polyphase.twin import Conversation, Fleet, FleetSettings, burst_load, chat_load
from polyphase.twin.fleet import router_of
from polyphase.twin.frontend import Patience
from polyphase.twin.load import ChatShape
from polyphase.worker.room import QueueLimits

MODEL = resolve_model("demo").location
KV_TOKEN_BYTES = 131_072  # of the imagined llama-3.1-8b


@st.composite
def fleets(draw: st.DrawFn) -> FleetSettings:
    """Small pools, so that sequences are preempted, and small batches, so that they wait."""
    block_size = draw(st.sampled_from([4, 16]))
    engine = MockSettings(
        MODEL,
        block_size=block_size,
        kv_bytes=draw(st.integers(600, 3000)) // block_size * block_size * KV_TOKEN_BYTES,
        max_batch_tokens=draw(st.sampled_from([32, 256, 2048])),
        max_running=draw(st.sampled_from([2, 8, 64])),
        max_waiting=draw(st.sampled_from([3, 1000])),
    )
    limits = draw(st.sampled_from([None, QueueLimits(4, 1000, 64), QueueLimits(1000, 100_000, 0)]))
    return FleetSettings(
        engine,
        worker_count=draw(st.integers(1, 3)),
        frontend_count=draw(st.integers(1, 3)),
        queue_limits=limits,
        patience=Patience(wait_ns=500_000_000),
    )


@st.composite
def loads(draw: st.DrawFn, block_size: int) -> list[Conversation]:
    shape = ChatShape(
        system_tokens=draw(st.integers(1, 200)),
        message_tokens=draw(st.integers(1, 100)),
        answer_tokens=draw(st.integers(1, 150)),
        turn_count=draw(st.integers(1, 3)),
        think_s=0.3,
    )
    seed = draw(st.integers(0, 1000))
    chats = chat_load(draw(st.integers(1, 12)), 20.0, lambda prompt, count: [len(prompt) % 97] * count, block_size, seed, shape)
    bursts = burst_load(draw(st.integers(0, 2)), 10, 0.5, block_size, seed, shape)
    return chats + bursts


def play(fleet: FleetSettings, policy: str, load: list[Conversation]) -> Fleet:
    run = Fleet(fleet, router_of(policy), load)
    while run.advance():
        pass
    return run


def check_conservation(run: Fleet, load: list[Conversation]) -> None:
    assert len(run.records) == run.done_count == sum(len(conversation.turns) for conversation in load)
    assert len({record.request_id for record in run.records}) == len(run.records)
    ended = Counter[str]()
    for record in run.records:
        assert record.ended_ns is not None
        if record.refused is not None:
            assert record.first_token_ns is None, "refused, and yet it was answered"
            continue
        ended[str(record.worker_id)] += 1
        assert record.first_token_ns is not None
        assert record.arrived_ns < record.first_token_ns <= record.ended_ns
        assert 0 <= record.cached_token_count < record.prompt_token_count
    for name, worker in run.workers.items():
        core = worker.machine.core
        core.pool.check_invariants()
        told = core.load()
        assert (core.has_requests, core.pool.used_count, told.running_count, told.waiting_count) == (False, 0, 0, 0)
        assert told.waiting_prefill_tokens == 0
        assert told.finished_total == ended[name]
    while run.timeline.step():  # the last events reach the routers
        pass
    for frontend in run.frontends:
        router = frontend.routing
        assert isinstance(router, Router)
        router.bookings.check()
        assert router.bookings.total().is_zero()
        for name, worker in run.workers.items():
            assert router.indexed_block_count(name) == len(worker.machine.core.pool.journal.held())


@settings(max_examples=40, deadline=None)
@given(data=st.data(), fleet=fleets(), policy=st.sampled_from(["kv", "round-robin"]))
def test_leaps_change_nothing_and_nothing_is_lost(data: st.DataObject, fleet: FleetSettings, policy: str) -> None:
    load = data.draw(loads(fleet.engine.block_size))
    one_by_one = play(replace(fleet, longest_stretch=1), policy, load)
    for longest in (2, 4096):
        leaping = play(replace(fleet, longest_stretch=longest), policy, load)
        assert leaping.records == one_by_one.records
        assert leaping.measures() == one_by_one.measures()
        for name, worker in leaping.workers.items():
            other = one_by_one.workers[name]
            assert worker.machine.core.load() == other.machine.core.load()
            assert worker.machine.core.pool.journal.held() == other.machine.core.pool.journal.held()
            assert (worker.busy_ns, worker.computed_prefill_tokens, worker.refusal_count) == (
                other.busy_ns,
                other.computed_prefill_tokens,
                other.refusal_count,
            )
    check_conservation(one_by_one, load)
    check_conservation(leaping, load)


def test_preemptions_happen_in_these_loads() -> None:
    """Else the test above would not have met them."""
    engine = MockSettings(MODEL, kv_bytes=1200 * KV_TOKEN_BYTES, max_running=64)
    shape = ChatShape(system_tokens=50, message_tokens=50, answer_tokens=150, turn_count=1, think_s=0.1)
    load = burst_load(2, 20, 0.5, 16, 1, shape)
    fleet = FleetSettings(engine, worker_count=1)
    runs = [play(replace(fleet, longest_stretch=longest), "kv", load) for longest in (1, 4096)]
    first, second = (run.workers["worker-0"].machine.core.load() for run in runs)  # type: ignore[index]
    assert first.preemptions_total > 0
    assert first == second
