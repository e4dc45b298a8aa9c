"""Predicted against reported, from the first output to the alarm that an operator sees."""

from __future__ import annotations

import logging

import pytest

from polyphase.core.hashing import sequence_hashes
from polyphase.frontend import fleet, predictions
from polyphase.router import drift, drift_watch
from polyphase.wire.events import BlocksRemoved, BlocksStored, Tier

from .fake_worker import FakeWorker
from .stack import Stack, wait_for

PROMPT = [7] * 25  # short of what is split
HASHES = [int(value) for value in sequence_hashes(PROMPT, 16)]


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are judged at once, by the test's own calls of `check`."""
    monkeypatch.setattr(drift_watch, "SETTLE_NS", 0)
    monkeypatch.setattr(predictions, "EVENTS_LAG_NS", 0)
    monkeypatch.setattr(fleet, "CHECK_INTERVAL_S", 3600)
    monkeypatch.setattr(drift, "SILENT_AFTER_NS", 3600 * 10**9)


async def ask(stack: Stack, count: int, **fields: object) -> None:
    for _ in range(count):
        answer = await stack.post("/v1/completions", {"model": "tiny", "prompt": PROMPT, "max_tokens": 1, **fields})
        assert answer.status_code == 200


def check(stack: Stack, repairs: int = 0) -> None:
    stack.services.dispatcher.predictions.check(lambda worker_id: repairs)


async def health_of(stack: Stack, worker: FakeWorker) -> dict[str, str] | None:
    page = (await stack.get("/health")).json()
    found: dict[str, str] | None = page["models"]["tiny"]["workers"][worker.worker_id]["drift"]
    return found


async def hear(stack: Stack, worker: FakeWorker, block_count: int) -> None:
    """Until the router knows this many blocks of the worker."""
    await wait_for(lambda: stack.router.indexed_block_count(stack.router.workers()[0].facts.worker_id) == block_count)


async def follow(stack: Stack, worker: FakeWorker) -> None:
    """Until the frontend follows the worker's event stream."""

    def is_followed() -> bool:
        worker.publish()
        return stack.router.workers()[0].load is not None

    await wait_for(is_followed)


async def test_a_silent_event_stream_is_named_everywhere(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    worker = await stack.add("worker-0")
    worker.behaviour.is_silent = True
    worker.behaviour.cached_tokens = 16
    await ask(stack, 11)
    check(stack)
    assert await health_of(stack, worker) is None, "too few to judge"
    await ask(stack, 1)
    with caplog.at_level(logging.INFO, "polyphase.frontend.predictions"):
        check(stack)
        check(stack)
    found = await health_of(stack, worker)
    assert found is not None
    assert found["reason"] == "silent-stream"
    assert len([record for record in caplog.records if "silent-stream" in record.getMessage()]) == 1, "told once, not at every check"
    metrics = (await stack.get("/metrics")).text
    assert 'polyphase_router_prediction_drift{reason="silent-stream",worker="worker-0"} 1.0' in metrics
    assert 'polyphase_router_reported_cached_tokens_total{worker="worker-0"} 192.0' in metrics
    await stack.kill("worker-0")
    await wait_for(lambda: not stack.services.dispatcher.predictions.drifts)
    assert 'reason="silent-stream"' not in (await stack.get("/metrics")).text


async def test_right_predictions_raise_no_alarm_and_end_one(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    worker = await stack.add("worker-0")
    await follow(stack, worker)
    worker.publish([BlocksStored(HASHES)])
    await hear(stack, worker, len(HASHES))
    worker.behaviour.cached_tokens = 16
    await ask(stack, 20)
    check(stack)
    assert await health_of(stack, worker) is None
    worker.behaviour.cached_tokens = 0
    await ask(stack, 20)
    check(stack)
    found = await health_of(stack, worker)
    assert found is not None
    assert found["reason"] == "lost-events"
    worker.behaviour.cached_tokens = 16
    await ask(stack, 64)
    with caplog.at_level(logging.INFO, "polyphase.frontend.predictions"):
        check(stack)
    assert await health_of(stack, worker) is None
    assert "agree again" in caplog.text
    record = (await stack.get("/debug/requests?limit=1")).json()["data"][0]
    assert (record["predicted_cached_tokens"], record["cached_tokens"]) == (16, 16)


async def test_blocks_that_go_between_routing_and_running(stack: Stack) -> None:
    worker = await stack.add("worker-0")
    await follow(stack, worker)
    for _ in range(12):
        worker.publish([BlocksStored(HASHES)])
        await hear(stack, worker, len(HASHES))
        await ask(stack, 1)
        worker.publish([BlocksRemoved(HASHES)])
        await hear(stack, worker, 0)
    worker.publish([BlocksStored(HASHES)])
    await hear(stack, worker, len(HASHES))
    worker.behaviour.cached_tokens = 16
    await ask(stack, 1)  # one that agrees: the engine does report
    check(stack)
    found = await health_of(stack, worker)
    assert found is not None
    assert found["reason"] == "eviction"


async def test_what_comes_back_from_host_memory_is_no_drift(stack: Stack) -> None:
    """An engine that reports tokens from host memory as cached has told of them; they were only not predicted for the device."""
    worker = await stack.add("worker-0")
    await follow(stack, worker)
    worker.publish([BlocksStored(HASHES), BlocksStored(HASHES, Tier.HOST), BlocksRemoved(HASHES)])
    facts = stack.router.workers()[0].facts
    await wait_for(lambda: stack.router.cached_block_count(facts.worker_id, HASHES) == len(HASHES))
    worker.behaviour.cached_tokens = 16
    await ask(stack, 20)
    check(stack)
    assert await health_of(stack, worker) is None


async def test_what_goes_in_lower_tiers_is_no_eviction(stack: Stack) -> None:
    worker = await stack.add("worker-0")
    await follow(stack, worker)
    worker.publish([BlocksStored(HASHES)])
    await hear(stack, worker, len(HASHES))
    worker_id = stack.router.workers()[0].facts.worker_id
    before = stack.services.dispatcher.predictions.removed_block_count(worker_id)
    worker.publish([BlocksStored([1, 2], Tier.HOST), BlocksRemoved([1, 2], Tier.HOST), BlocksStored([3])])
    await wait_for(lambda: stack.router.cached_block_count(worker_id, [3]) == 1)
    assert stack.services.dispatcher.predictions.removed_block_count(worker_id) == before
