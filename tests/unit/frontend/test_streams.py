"""Event streams over real sockets: what the frontend shows of them, and that damage mends itself."""

from __future__ import annotations

import re

import msgspec
import pytest

from polyphase.core.ids import SequenceHash, WorkerId
from polyphase.wire.events import BlocksRemoved, BlocksStored, Load, Tier
from tests.unit.frontend.stack import Stack, wait_for

W = WorkerId("w")


async def metric(stack: Stack, name: str) -> float:
    text = (await stack.get("/metrics")).text
    found = re.search(rf'^{name}(?:{{worker="w"}})? (\S+)$', text, re.MULTILINE)
    assert found, f"no {name} in\n{text}"
    return float(found[1])


async def test_the_index_and_the_streams_are_shown(stack: Stack) -> None:
    worker = await stack.add("w")
    worker.publish([BlocksStored([1, 2, 3]), BlocksStored([3, 4], Tier.HOST)])
    await wait_for(lambda: stack.router.index.size == 4)
    page = (await stack.get("/health")).json()
    assert page["index"]["block_count"] == 4
    assert page["index"]["kind"] in ("native", "naive")
    (model,) = page["models"].values()
    assert model["workers"]["w"]["stream"] == {"is_synced": True, "gaps": 0, "drifts": 0, "repairs": 0, "snapshots": 1}
    assert await metric(stack, "polyphase_router_index_blocks") == 4
    assert await metric(stack, "polyphase_router_index_capacity_blocks") >= 1_000_000
    assert await metric(stack, "polyphase_router_index_forgotten_blocks_total") == 0
    assert await metric(stack, "polyphase_router_index_bytes") > 0
    assert await metric(stack, "polyphase_router_stream_synced") == 1
    assert await metric(stack, "polyphase_router_stream_snapshots_total") == 1


async def test_a_damaged_index_is_mended_by_the_next_batch(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    worker = await stack.add("w")
    worker.publish([BlocksStored([1, 2, 3])])
    await wait_for(lambda: stack.router.index.size == 3)
    stack.router.index.remove(W, [SequenceHash(2)])
    stack.router.index.store(W, [SequenceHash(77)], Tier.DISK)
    worker.publish([BlocksRemoved([1])])
    await wait_for(lambda: stack.services.streams()["w"].counts.drifts == 1)
    await wait_for(lambda: worker.publish() or stack.services.streams()["w"].counts.snapshots == 2)
    await wait_for(lambda: stack.services.streams()["w"].is_synced)
    assert [stack.router.index.block_count(W, tier) for tier in Tier] == [2, 0, 0, 0]
    assert await metric(stack, "polyphase_router_stream_drifts_total") == 1
    assert sum("worker w: what is known of its blocks has drifted" in record.message for record in caplog.records) == 1


async def test_a_lost_batch_is_asked_for(stack: Stack) -> None:
    worker = await stack.add("w")
    worker.publish([BlocksStored([1])])
    await wait_for(lambda: stack.router.index.size == 1)
    await wait_for(lambda: worker.publish() or stack.router.workers()[0].load)  # the subscription stands
    worker._publisher.source.next_batch([BlocksStored([2])], Load())  # reaches nobody
    worker.publish([BlocksStored([3])])
    await wait_for(lambda: stack.router.index.size == 3)
    assert stack.services.streams()["w"].counts.repairs >= 1
    assert stack.services.streams()["w"].counts.snapshots == 1


async def test_a_card_may_say_that_there_are_no_events(stack: Stack) -> None:
    worker = await stack.add("w", card=msgspec.structs.replace(stack.card, publishes_events=False))
    assert not stack.router.workers()[0].facts.publishes_events
    worker.publish([BlocksStored([1])])
    await wait_for(lambda: worker.publish() or stack.services.streams()["w"].counts.snapshots == 1)
    assert stack.router.index.size == 0
