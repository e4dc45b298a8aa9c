"""When a worker has enough, and whether the router knows that somebody has not."""

from __future__ import annotations

import pytest

from polyphase.core.errors import NoWorkers
from polyphase.core.ids import Epoch, RequestId, WorkerId
from polyphase.router import SplitRule, WorkerView
from polyphase.router.saturation import PREFILL_STEPS, is_saturated
from polyphase.wire.cards import Role
from polyphase.wire.events import Load
from tests.unit.router.builders import facts, prefix, request, router_with

FACTS = facts("w", max_running=8)


def view(load: Load | None, *, tokens: int = 0, blocks: int = 0, requests: int = 0) -> WorkerView:
    return WorkerView(FACTS, load, 0, tokens, blocks, requests, tokens, blocks)


@pytest.mark.parametrize(
    ("worker", "expected"),
    [
        (view(None), False),
        (view(Load()), False),
        (view(None, tokens=PREFILL_STEPS * FACTS.max_batch_tokens, requests=1), True),
        (view(Load(running_count=1, waiting_prefill_tokens=PREFILL_STEPS * FACTS.max_batch_tokens - 1)), False),
        (view(Load(running_count=1, waiting_prefill_tokens=PREFILL_STEPS * FACTS.max_batch_tokens)), True),
        (view(Load(running_count=1, waiting_prefill_tokens=FACTS.max_batch_tokens), tokens=FACTS.max_batch_tokens), True),
        (view(Load(running_count=8)), False),
        (view(Load(running_count=8, waiting_count=1)), True),
        (view(None, requests=9), True),
        (view(Load(running_count=1, used_block_count=FACTS.block_count)), True),
        (view(Load(running_count=1, used_block_count=FACTS.block_count - 2, waiting_prefill_tokens=2 * FACTS.block_size)), True),
        (view(Load(used_block_count=FACTS.block_count, leased_block_count=FACTS.block_count)), False),
    ],
)
def test_a_worker_has_enough(worker: WorkerView, expected: bool) -> None:
    assert is_saturated(worker) is expected


def test_the_router_follows_reports_bookings_and_ends() -> None:
    router = router_with(facts("a", max_running=2), facts("b", max_running=2))
    asked = [request(str(number), prefix(number, 2), tokens=40) for number in range(7)]
    for one in asked[:6]:
        assert router.has_headroom(one)
        router.route(one)
    assert not router.has_headroom(asked[6])
    router.release(RequestId("3"))
    assert router.has_headroom(asked[6])
    for worker_id in ("a", "b"):
        router.report_load(WorkerId(worker_id), Epoch(1), Load(running_count=2, waiting_count=5))
    assert not router.has_headroom(asked[6])
    router.upsert_worker(facts("c", max_running=2))
    assert router.has_headroom(asked[6])
    router.remove_worker(WorkerId("c"))
    assert not router.has_headroom(asked[6])


def test_only_long_prompts_wait_for_prefill_workers() -> None:
    router = router_with(facts("p", Role.PREFILL), facts("d", Role.DECODE), split=SplitRule(min_uncached_tokens=64))
    short, long = request("s", prefix(1, 1), tokens=20), request("l", prefix(2, 8), tokens=128)
    assert not router.waits_for_prefill(short)
    assert router.waits_for_prefill(long)
    router.report_load(WorkerId("p"), Epoch(1), Load(running_count=1, waiting_prefill_tokens=10**6))
    assert router.has_headroom(short)
    assert not router.has_headroom(long)
    router.remove_worker(WorkerId("p"))
    assert router.has_headroom(long)


def test_without_workers_there_is_nothing_to_wait_for() -> None:
    with pytest.raises(NoWorkers):
        router_with().has_headroom(request("r", []))
