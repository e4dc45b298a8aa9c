"""A worker moves requests, tokens, events and leases between its peers and its engine; every request ends exactly once."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from pathlib import Path

import msgspec
import pytest

from polyphase.core.errors import WorkerLost
from polyphase.core.hashing import sequence_hashes
from polyphase.runtime import Delivery, Registry, WorkerClient, channel
from polyphase.testing.connections import cut_connections
from polyphase.wire.cards import ModelCard, WorkerStatus
from polyphase.wire.events import Load
from polyphase.wire.kv import EngineOffer
from polyphase.wire.requests import (
    Cancel,
    Drain,
    FinishReason,
    Question,
    ReleaseLease,
    SamplingParams,
    SequenceOutput,
    StepOutputs,
    StopConditions,
    Submit,
)
from polyphase.worker.room import QueueLimits
from tests.unit.runtime.waiting import eventually
from tests.unit.worker.conftest import Hosted, HostStarter
from tests.unit.worker.fake_engine import (
    BLOCK_SIZE,
    CONTEXT_LENGTH,
    CRASH_ON_SUBMIT,
    CRASH_THE_LOOP,
    NEVER_ANSWER,
    expected_tokens,
)
from tests.unit.worker.peer import Peer


def connected(peer: Peer, *hosts: Hosted) -> None:
    for hosted in hosts:
        peer.connect(hosted.entry)


async def test_tokens_come_grouped_by_step_and_peer(start_host: HostStarter, peer: Peer) -> None:
    hosted = start_host(step_s=0.01)
    async with Peer() as other:
        connected(peer, hosted)
        connected(other, hosted)
        ids = [peer.submit("w", [number, 7], max_tokens=4) for number in range(1, 4)]
        foreign = other.submit("w", [50, 7], max_tokens=4)
        for request_id, first in zip(ids, range(1, 4), strict=True):
            assert (await peer.last(request_id)).finish_reason is FinishReason.LENGTH
            assert peer.tokens(request_id) == expected_tokens([first, 7], 4)
        await other.last(foreign)
        assert other.tokens(foreign) == expected_tokens([50, 7], 4)
        assert set(other.outputs) == {foreign}
        assert len(peer.reports) < 12  # three requests of four tokens share their steps
        assert {(report.worker_id, report.epoch) for report in peer.reports} == {("w", 1)}


async def test_the_registry_shows_the_worker_and_questions_are_answered(start_host: HostStarter, peer: Peer, run_folder: Path) -> None:
    hosted = start_host()
    connected(peer, hosted)
    card = await peer.client.ask("w", Question.CARD)
    assert isinstance(card, ModelCard)
    assert card == hosted.engine.card
    status = await peer.client.ask("w", Question.STATUS)
    assert isinstance(status, WorkerStatus)
    assert status.entry == hosted.entry
    assert status.rss_bytes > 0
    assert Registry(run_folder).entries() == [hosted.entry]


async def test_events_and_load_reach_listeners(start_host: HostStarter, peer: Peer) -> None:
    hosted = start_host()
    connected(peer, hosted)
    for number in range(5):
        await peer.last(peer.submit("w", list(range(number * 10, number * 10 + 9)), max_tokens=2))
    await eventually(lambda: peer.hashes.get("w") == set(hosted.engine.hashes))
    prompt = list(range(500, 500 + 2 * BLOCK_SIZE))
    await peer.last(peer.submit("w", prompt))
    await eventually(lambda: set(sequence_hashes(prompt, BLOCK_SIZE)) <= peer.hashes["w"])
    await eventually(lambda: peer.loads["w"].finished_total == 6)


async def test_what_nobody_awaits_any_more_is_given_up(start_host: HostStarter, peer: Peer) -> None:
    """Its peer, which would have cancelled it, may be unable to: it is cut off, or stuck."""
    hosted = start_host(step_s=0.01)
    connected(peer, hosted)
    stuck = peer.submit("w", [NEVER_ANSWER], remaining_ms=1)
    long = peer.submit("w", [1, 2], max_tokens=190, remaining_ms=300)
    done = peer.submit("w", [3, 4], max_tokens=2, remaining_ms=60_000)
    for request_id in (stuck, long):
        last = await peer.last(request_id)
        assert last.failure is not None
        assert last.failure.code == "deadline_exceeded"
        assert not last.failure.is_retryable
    assert len(peer.tokens(long)) < 190
    assert (await peer.last(done)).finish_reason is FinishReason.LENGTH
    await eventually(lambda: not hosted.engine.load().running_count and not hosted.engine.load().waiting_count)


async def test_a_cancelled_request_ends_once_and_only_by_its_own_peer(start_host: HostStarter, peer: Peer) -> None:
    hosted = start_host(step_s=0.01)
    connected(peer, hosted)
    request_id = peer.submit("w", [1, 2], max_tokens=150)
    await eventually(lambda: len(peer.tokens(request_id)) > 2)
    async with Peer() as other:
        connected(other, hosted)
        other.client.send("w", Cancel(request_id))
        await other.client.ask("w", Question.STATUS)
    peer.client.send("w", Cancel(request_id))
    peer.client.send("w", Cancel(request_id))
    peer.client.send("w", Cancel("unknown"))
    assert (await peer.last(request_id)).finish_reason is FinishReason.CANCELLED
    await peer.client.ask("w", Question.STATUS)
    assert not hosted.engine.running


async def test_what_the_engine_refuses_is_answered(start_host: HostStarter, peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    hosted = start_host()
    connected(peer, hosted)
    last = await peer.last(peer.submit("w", [1] * CONTEXT_LENGTH))
    assert last.finish_reason is FinishReason.ERROR
    assert last.failure is not None
    assert (last.failure.code, last.failure.is_retryable) == ("context_length_exceeded", False)
    last = await peer.last(peer.submit("w", [CRASH_ON_SUBMIT]))
    assert last.failure is not None
    assert (last.failure.code, last.failure.is_retryable) == ("engine_failed", True)
    assert "a bug in submit" in caplog.text
    assert len(hosted.host._live) == 0
    assert (await peer.last(peer.submit("w", [1, 2]))).finish_reason is FinishReason.LENGTH


async def test_a_full_worker_refuses_with_its_load(start_host: HostStarter, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    hosted = start_host()
    connected(peer, hosted)
    hosted.host._settings = dataclasses.replace(hosted.host._settings, limits=QueueLimits(5, 1000))
    load = Load(waiting_count=2, waiting_prefill_tokens=1000, running_count=3)
    monkeypatch.setattr(hosted.engine, "load", lambda: load)
    last = await peer.last(peer.submit("w", [1, 2]))
    assert last.failure is not None
    assert (last.failure.code, last.failure.is_retryable, last.failure.load) == ("overloaded", True, load)
    assert not hosted.engine.running
    assert (await peer.last(peer.submit("w", [1, 2], emitted=1))).finish_reason is FinishReason.LENGTH  # promised elsewhere already
    load = Load(waiting_count=5)
    assert (await peer.last(peer.submit("w", [1, 2], emitted=1))).finish_reason is FinishReason.ERROR
    load = Load(waiting_count=4)
    assert (await peer.last(peer.submit("w", [1, 2]))).failure is None


async def test_a_request_id_in_use_is_refused(start_host: HostStarter, peer: Peer) -> None:
    hosted = start_host(step_s=0.01)
    connected(peer, hosted)
    async with Peer() as other:
        connected(other, hosted)
        request_id = peer.submit("w", [1, 2], max_tokens=50)
        await eventually(lambda: peer.tokens(request_id))
        other.submit("w", [3, 4], request_id=request_id)
        last = await other.last(request_id)
        assert last.failure is not None
        assert "runs already" in last.failure.message
        await peer.last(request_id)
        assert peer.tokens(request_id) == expected_tokens([1, 2], 50)


async def hand_over(peer: Peer, prompt: list[int], max_tokens: int = 5) -> tuple[list[int], str]:
    """Prefill at `p`, decode at `d`; returns all tokens and the decode leg's id."""
    first_leg = peer.submit("p", prompt, max_tokens, hand_over=True)
    last = await peer.last(first_leg)
    assert last.finish_reason is FinishReason.HANDED_OVER
    first = peer.tokens(first_leg)
    second_leg = peer.submit("d", [*prompt, *first], max_tokens, offer=last.offer, emitted=len(first))
    await peer.last(second_leg)
    return first + peer.tokens(second_leg), second_leg


async def test_blocks_are_handed_over_and_their_lease_released(start_host: HostStarter, peer: Peer) -> None:
    prefill, decode = start_host("p"), start_host("d")
    connected(peer, prefill, decode)
    for start in (0, 100, 200):
        prompt = list(range(start, start + 11))
        tokens, leg = await hand_over(peer, prompt)
        assert tokens == expected_tokens(prompt, 5)
        stats = peer.outputs[leg][0].stats
        assert stats is not None
        assert stats.transferred_token_count == 8
    await eventually(lambda: not prefill.engine.leases)
    await eventually(lambda: peer.loads["p"].leased_block_count == 0)


async def test_an_unreadable_offer_is_computed_anew_and_released(
    start_host: HostStarter, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, decode = start_host("p"), start_host("d")
    connected(peer, prefill, decode)
    last = await peer.last(peer.submit("p", list(range(9)), hand_over=True))
    assert last.offer is not None
    broken = msgspec.structs.replace(last.offer, agent=msgspec.structs.replace(last.offer.agent, epoch=7))
    leg = peer.submit("d", [*range(9), *last.token_ids], offer=broken, emitted=1)
    await peer.last(leg)
    assert last.token_ids + peer.tokens(leg) == expected_tokens(list(range(9)), 5)
    assert "computed here" in caplog.text
    await eventually(lambda: not prefill.engine.leases)


async def test_a_refused_request_gives_its_offer_back(start_host: HostStarter, peer: Peer) -> None:
    prefill, decode = start_host("p"), start_host("d")
    connected(peer, prefill, decode)
    last = await peer.last(peer.submit("p", list(range(9)), hand_over=True))
    await peer.last(peer.submit("d", [1] * CONTEXT_LENGTH, offer=last.offer))
    await eventually(lambda: not prefill.engine.leases)


async def test_cancelling_while_a_pool_is_opened_ends_the_request(
    start_host: HostStarter, peer: Peer, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = start_host("p"), start_host("d")
    connected(peer, prefill, decode)

    async def never(descriptor: object) -> None:
        await asyncio.sleep(600)

    monkeypatch.setattr(decode.host._sources, "open", never)
    last = await peer.last(peer.submit("p", list(range(9)), hand_over=True))
    request_id = peer.submit("d", [*range(9), 1], offer=last.offer, emitted=1)
    peer.client.send("d", Cancel(request_id))
    assert (await peer.last(request_id)).finish_reason is FinishReason.CANCELLED
    assert not decode.engine.running
    await eventually(lambda: not prefill.engine.leases)


async def test_cancelling_after_the_hand_over_frees_the_lease(start_host: HostStarter, peer: Peer) -> None:
    prefill = start_host("p")
    connected(peer, prefill)
    for release in ("cancel", "release"):
        request_id = peer.submit("p", list(range(9)), hand_over=True)
        last = await peer.last(request_id)
        assert last.offer is not None
        assert prefill.engine.leases
        peer.client.send("p", Cancel(request_id) if release == "cancel" else ReleaseLease(last.offer.lease_id))
        await eventually(lambda: not prefill.engine.leases)


async def test_freed_leases_are_reported_without_waiting_for_the_next_step(
    start_host: HostStarter, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise routers take the blocks of every hand-over for used until the next heartbeat."""
    monkeypatch.setattr("polyphase.worker.host.HEARTBEAT_INTERVAL_S", 3600.0)
    prefill = start_host("p")
    connected(peer, prefill)
    for release in ("cancel", "release"):
        request_id = peer.submit("p", list(range(9)), hand_over=True)
        last = await peer.last(request_id)
        assert last.offer is not None
        await eventually(lambda: peer.loads["p"].leased_block_count == 2)
        peer.client.send("p", Cancel(request_id) if release == "cancel" else ReleaseLease(last.offer.lease_id))
        await eventually(lambda: peer.loads["p"].leased_block_count == 0)


@pytest.mark.parametrize("prompt", [[1, 2], [NEVER_ANSWER]])
async def test_requests_of_a_peer_that_went_away_are_aborted(start_host: HostStarter, peer: Peer, prompt: list[int]) -> None:
    """Also those that wait for their first token, when nothing is sent to the peer by itself."""
    hosted = start_host(step_s=0.02)
    connected(peer, hosted)
    request_id = peer.submit("w", prompt, max_tokens=190)
    await eventually(lambda: request_id in hosted.engine.running)
    peer.client.disconnect("w")
    await eventually(lambda: not hosted.engine.running)
    assert len(hosted.host._live) == 0


async def test_an_offer_to_a_peer_that_went_away_pins_nothing(start_host: HostStarter, peer: Peer) -> None:
    hosted = start_host("p", step_s=0.3)
    connected(peer, hosted)
    request_id = peer.submit("p", list(range(9)), hand_over=True)
    await eventually(lambda: request_id in hosted.engine.running)
    peer.client.disconnect("p")
    await eventually(lambda: not hosted.engine.running)
    await eventually(lambda: not hosted.engine.leases)


async def test_draining_finishes_what_runs_and_refuses_the_rest(start_host: HostStarter, peer: Peer, run_folder: Path) -> None:
    hosted = start_host(step_s=0.01)
    connected(peer, hosted)
    running = peer.submit("w", [1, 2], max_tokens=60)
    await eventually(lambda: peer.tokens(running))
    peer.client.send("w", Drain())
    late = await peer.last(peer.submit("w", [3, 4]))
    assert late.failure is not None
    assert (late.failure.code, late.failure.is_retryable) == ("draining", True)
    assert [entry.is_draining for entry in Registry(run_folder).entries()] == [True]
    hosted.host.drain()
    assert (await peer.last(running)).finish_reason is FinishReason.LENGTH
    assert peer.tokens(running) == expected_tokens([1, 2], 60)
    async with asyncio.timeout(20):
        await hosted.task
    assert Registry(run_folder).entries() == []
    assert os.listdir(run_folder / "sockets") == []
    assert os.listdir(run_folder / "workers") == []


async def test_what_does_not_finish_in_time_ends_in_an_error_that_may_be_retried(start_host: HostStarter, peer: Peer) -> None:
    hosted = start_host(drain_timeout_s=0.05)
    connected(peer, hosted)
    request_id = peer.submit("w", [NEVER_ANSWER])
    await eventually(lambda: request_id in hosted.engine.running)
    hosted.host.drain()
    last = await peer.last(request_id)
    assert last.failure is not None
    assert (last.failure.code, last.failure.is_retryable) == ("worker_lost", True)
    async with asyncio.timeout(20):
        await hosted.task


async def test_draining_waits_for_leases_that_are_still_to_be_read(start_host: HostStarter, peer: Peer) -> None:
    hosted = start_host("p")
    connected(peer, hosted)
    last = await peer.last(peer.submit("p", list(range(9)), hand_over=True))
    hosted.host.drain()
    await asyncio.sleep(0.2)
    assert not hosted.task.done()
    assert last.offer is not None
    peer.client.send("p", ReleaseLease(last.offer.lease_id))
    async with asyncio.timeout(20):
        await hosted.task


async def test_draining_without_a_run_folder_still_ends(start_host: HostStarter, run_folder: Path) -> None:
    hosted = start_host()
    await asyncio.sleep(0)
    for folder in ("workers", "sockets"):
        for name in os.listdir(run_folder / folder):
            os.unlink(run_folder / folder / name)
        os.rmdir(run_folder / folder)
    hosted.host.drain()
    async with asyncio.timeout(20):
        await hosted.task


async def test_an_engine_that_breaks_ends_the_worker_and_tells_its_peers(start_host: HostStarter, peer: Peer, run_folder: Path) -> None:
    hosted = start_host(step_s=0.05)
    connected(peer, hosted)
    waiting = peer.submit("w", [1, 2], max_tokens=150)
    await eventually(lambda: peer.tokens(waiting))
    breaking = peer.submit("w", [CRASH_THE_LOOP])
    for request_id in (waiting, breaking):
        last = await peer.last(request_id)
        assert last.failure is not None
        assert (last.failure.code, last.failure.is_retryable) == ("engine_failed", True)
    with pytest.raises(BaseExceptionGroup):
        await hosted.task
    assert os.listdir(run_folder / "workers") == []
    assert os.listdir(run_folder / "sockets") == []


async def test_an_offer_of_another_kind_is_computed_here_and_given_back(start_host: HostStarter, peer: Peer) -> None:
    hosted, giver = start_host("w"), start_host("p")
    connected(peer, hosted, giver)
    done = await peer.last(peer.submit("p", list(range(1, 40)), hand_over=True))
    lease = next(iter(giver.engine.leases))
    assert done.offer is not None
    offer = EngineOffer("p", 1, giver.entry.request_endpoint, lease, done.offer.expires_at_ns, "vllm-nixl/1", {"remote_port": 1}, 39)
    request_id = peer.submit("w", list(range(1, 40)), max_tokens=3, offer=offer)
    assert (await peer.last(request_id)).finish_reason is FinishReason.LENGTH
    assert peer.tokens(request_id) == expected_tokens(list(range(1, 40)), 3)
    await eventually(lambda: not giver.engine.leases)


async def test_a_peer_that_stood_still_is_told_what_was_given_up(start_host: HostStarter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queue is full, its request is aborted; when it reads again, the request ends there too, in an error that another may mend."""
    monkeypatch.setattr(channel, "MAX_QUEUED_MESSAGES", 5)
    hosted = start_host(step_s=0.01)
    ends: list[SequenceOutput] = []
    frozen = WorkerClient(lambda report: ends.extend(output for output in report.outputs if output.request_id == "f"), "frozen")
    frozen.connect("w", hosted.entry.request_endpoint)
    sampling, stop = SamplingParams(seed=1, temperature=0), StopConditions(max_tokens=150)
    frozen.send("w", Submit(request_id="f", token_ids=[1, 2], prompt_token_count=2, sampling=sampling, stop=stop))
    await eventually(lambda: hosted.engine.running)
    [stuck] = hosted.host._live.peers()
    big = StepOutputs("w", 1, 1, [SequenceOutput(request_id="other", token_ids=[1] * 50_000)])
    await eventually(lambda: hosted.host._server.send(stuck, big) is Delivery.NOT_READ)
    await eventually(lambda: not hosted.engine.running)
    assert hosted.host._outbox._owed
    reading = asyncio.create_task(frozen.run())
    try:
        await eventually(lambda: ends and ends[-1].finish_reason is not None)
        assert ends[-1].failure is not None
        assert (ends[-1].failure.code, ends[-1].failure.is_retryable) == ("connection_lost", True)
        assert [output.finish_reason for output in ends].count(FinishReason.ERROR) == 1
        await eventually(lambda: not hosted.host._outbox._owed)
    finally:
        reading.cancel()
        frozen.close()


async def test_nothing_is_owed_to_a_peer_that_has_gone(start_host: HostStarter, peer: Peer) -> None:
    hosted = start_host(step_s=0.01)
    async with Peer() as other:
        connected(other, hosted)
        other.submit("w", [1, 2], max_tokens=150)
        await eventually(lambda: hosted.engine.running)
    await eventually(lambda: not hosted.engine.running)
    assert not hosted.host._outbox._owed


async def test_a_release_that_was_lost_with_the_connection_is_said_again(start_host: HostStarter, peer: Peer) -> None:
    prefill, decode = start_host("p"), start_host("d")
    connected(peer, prefill)
    leases = decode.host._releases
    for number in range(3):
        last = await peer.last(peer.submit("p", list(range(9 + number)), hand_over=True))
        assert last.offer is not None
        leases.send(last.offer)
        await eventually(lambda: not prefill.engine.leases)
        # As if it had not arrived: the lease is there, and the connection breaks.
        prefill.engine.leases[last.offer.lease_id] = ("r", [], time.monotonic_ns() + 60 * 10**9)
        assert cut_connections(os.getpid(), prefill.paths.request_socket)
        await eventually(lambda: not prefill.engine.leases)


async def test_a_lease_given_back_to_an_agent_that_is_lost_is_released_otherwise(start_host: HostStarter, peer: Peer) -> None:
    prefill, decode = start_host("p"), start_host("d")
    connected(peer, prefill, decode)
    await hand_over(peer, list(range(11)))
    await eventually(lambda: not prefill.engine.leases)
    [(session, offer)] = decode.host._sources._given_back
    prefill.engine.leases[offer.lease_id] = ("r", [], time.monotonic_ns() + 60 * 10**9)  # as if it had not heard of it
    assert cut_connections(os.getpid(), prefill.paths.pool_socket)
    await eventually(lambda: session.is_lost)
    await eventually(lambda: not prefill.engine.leases)
    assert not decode.host._sources._given_back


async def test_a_question_for_blocks_is_for_one_life_of_a_worker(start_host: HostStarter, peer: Peer) -> None:
    hosted = start_host()
    connected(peer, hosted)
    part = await peer.client.find_blocks("w", hosted.entry.epoch, 3, [b"a" * 32], 5)
    assert (part.first_block, part.block_ids) == (3, [])
    with pytest.raises(WorkerLost, match="another life"):
        await peer.client.find_blocks("w", hosted.entry.epoch + 1, 0, [b"a" * 32], 5)


async def test_a_draining_worker_still_says_where_its_blocks_are(start_host: HostStarter, peer: Peer) -> None:
    hosted = start_host()
    connected(peer, hosted)
    peer.submit("w", [NEVER_ANSWER])
    await eventually(lambda: hosted.engine.running)
    hosted.host.drain()
    assert (await peer.client.find_blocks("w", hosted.entry.epoch, 1, [], 30)).first_block == 1
