"""Messages between a worker and its peers arrive, or the sender is told that they will not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq

from polyphase.core.errors import ConfigurationError, WorkerLost
from polyphase.runtime import PeerId, WorkerClient, WorkerServer, channel
from polyphase.wire.events import SnapshotPage, Tier
from polyphase.wire.requests import (
    Answer,
    Cancel,
    Query,
    Question,
    ReleaseLease,
    SequenceOutput,
    StepOutputs,
    ToWorker,
)
from tests.unit.runtime.waiting import eventually


class Worker:
    """A server that remembers what it got and answers questions about its snapshot."""

    def __init__(self, endpoint: str) -> None:
        self.received: list[tuple[PeerId, ToWorker]] = []
        self.server = WorkerServer(endpoint, self.handle)
        self.is_mute = False

    def handle(self, peer: PeerId, message: ToWorker) -> None:
        self.received.append((peer, message))
        if isinstance(message, Query) and not self.is_mute:
            self.server.send(peer, Answer(message.query_id, SnapshotPage("w", 1, 5, {Tier.DEVICE: bytes(16)})))


def outputs(step: int, token_id: int = 1) -> StepOutputs:
    return StepOutputs("w", 1, step, [SequenceOutput(request_id="r", token_ids=[token_id])])


@asynccontextmanager
async def running(*parts: WorkerServer | WorkerClient) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(part.run()) for part in parts]
    await asyncio.sleep(0)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for part in parts:
            part.close()
            part.close()


async def test_questions_are_answered_and_messages_keep_their_order(run_folder: Path) -> None:
    endpoint = f"ipc://{run_folder}/w"
    worker, seen = Worker(endpoint), list[StepOutputs]()
    client = WorkerClient(seen.append)
    async with running(worker.server, client):
        client.connect("w", endpoint)
        assert client.is_connected("w")
        for number in range(2000):
            client.send("w", Cancel(str(number)))
        assert await client.ask("w", Question.SNAPSHOT) == SnapshotPage("w", 1, 5, {Tier.DEVICE: bytes(16)})
        assert [message.request_id for _, message in worker.received[:-1] if isinstance(message, Cancel)] == [str(n) for n in range(2000)]
        peer = worker.received[0][0]
        for step in range(2000):
            assert worker.server.send(peer, outputs(step))
        await eventually(lambda: len(seen) == 2000)
        assert [report.step for report in seen] == list(range(2000))


async def test_several_clients_and_workers_do_not_mix(run_folder: Path) -> None:
    workers = [Worker(f"ipc://{run_folder}/{name}") for name in "ab"]
    clients = [WorkerClient(lambda _: None, name=f"frontend-{number}") for number in range(3)]
    async with running(*(worker.server for worker in workers), *clients):
        for client in clients:
            for name in "ab":
                client.connect(name, f"ipc://{run_folder}/{name}")
        await asyncio.gather(*(client.ask(name, Question.SNAPSHOT) for client in clients for name in "ab"))
        for worker in workers:
            peers = {peer for peer, _ in worker.received}
            assert len(peers) == 3
            assert {peer[:10] for peer in peers} == {b"frontend-0", b"frontend-1", b"frontend-2"}


async def test_a_question_ends_when_the_worker_leaves_or_keeps_silent(run_folder: Path) -> None:
    worker = Worker(f"ipc://{run_folder}/w")
    worker.is_mute = True
    client = WorkerClient(lambda _: None)
    async with running(worker.server, client):
        with pytest.raises(WorkerLost, match="not connected"):
            await client.ask("w", Question.CARD)
        client.connect("w", f"ipc://{run_folder}/w")
        with pytest.raises(WorkerLost, match=r"did not answer the question for its card within 0\.05 s"):
            await client.ask("w", Question.CARD, timeout_s=0.05)
        question = asyncio.create_task(client.ask("w", Question.CARD, timeout_s=60))
        await eventually(lambda: len(worker.received) == 2)
        client.disconnect("w")
        client.disconnect("w")
        with pytest.raises(WorkerLost, match="went away"):
            await question
        with pytest.raises(WorkerLost, match="not connected"):
            client.send("w", ReleaseLease("l"))


async def test_a_peer_that_went_away_is_noticed_by_the_next_send(run_folder: Path) -> None:
    endpoint = f"ipc://{run_folder}/w"
    worker = Worker(endpoint)
    first, second = WorkerClient(lambda _: None), WorkerClient(lambda _: None)
    async with running(worker.server, first, second):
        first.connect("w", endpoint)
        second.connect("w", endpoint)
        await first.ask("w", Question.SNAPSHOT)
        await second.ask("w", Question.SNAPSHOT)
        gone, stays = worker.received[0][0], worker.received[1][0]
        assert worker.server.send(gone, outputs(1))
        first.disconnect("w")
        await eventually(lambda: not worker.server.send(gone, outputs(2)))
        assert worker.server.send(stays, outputs(2))
        assert not worker.server.send(PeerId(b"never seen"), outputs(1))
        # who comes back is another peer: what the earlier one had asked for is not mixed with its new requests
        first.connect("w", endpoint)
        await first.ask("w", Question.SNAPSHOT)
        assert worker.received[-1][0] not in (gone, stays)


async def test_a_send_that_fails_does_not_hide_what_came_meanwhile(run_folder: Path) -> None:
    endpoint = f"ipc://{run_folder}/w"
    worker, client = Worker(endpoint), WorkerClient(lambda _: None)
    async with running(worker.server, client):
        client.connect("w", endpoint)
        client.send("w", Cancel("a"))
        await eventually(lambda: len(worker.received) == 1)
        client.send("w", Cancel("b"))
        time.sleep(0.2)  # noqa: ASYNC251  the loop sees nothing of its arrival
        assert not worker.server.send(PeerId(b"nobody"), outputs(1))
        await eventually(lambda: len(worker.received) == 2)
    client.close()
    worker.server.close()


async def test_a_peer_that_does_not_read_fills_its_own_queue_only(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "MAX_QUEUED_MESSAGES", 5)
    endpoint = f"ipc://{run_folder}/w"
    worker, seen = Worker(endpoint), list[StepOutputs]()
    stalled, lively = WorkerClient(lambda _: None), WorkerClient(seen.append)
    async with running(worker.server, lively):
        stalled.connect("w", endpoint)
        stalled.send("w", Cancel("x"))  # but never runs
        lively.connect("w", endpoint)
        await lively.ask("w", Question.SNAPSHOT)
        await eventually(lambda: len(worker.received) == 2)
        slow = next(peer for peer, message in worker.received if isinstance(message, Cancel))
        quick = next(peer for peer, message in worker.received if isinstance(message, Query))
        big = StepOutputs("w", 1, 1, [SequenceOutput(request_id="r", token_ids=[1] * 50_000)])
        await eventually(lambda: not worker.server.send(slow, big))
        assert worker.server.send(quick, outputs(1))
        await eventually(lambda: seen)
    stalled.close()


async def test_a_worker_that_does_not_read_is_lost(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "MAX_QUEUED_MESSAGES", 5)
    worker = Worker(f"ipc://{run_folder}/w")
    client = WorkerClient(lambda _: None)
    async with running(client):
        client.connect("w", f"ipc://{run_folder}/w")

        def flood() -> None:
            for _ in range(10_000):
                client.send("w", Cancel("x" * 10_000))

        with pytest.raises(WorkerLost, match="does not take messages"):
            flood()
    worker.server.close()


async def test_a_client_finds_the_next_life_at_the_same_endpoint(run_folder: Path) -> None:
    endpoint = f"ipc://{run_folder}/w"
    client = WorkerClient(lambda _: None)
    async with running(client):
        worker = Worker(endpoint)
        async with running(worker.server):
            client.connect("w", endpoint)
            await client.ask("w", Question.SNAPSHOT)
        worker = Worker(endpoint)
        async with running(worker.server):
            client.connect("w", endpoint)
            await client.ask("w", Question.SNAPSHOT)


async def test_what_does_not_decode_is_counted_and_does_no_harm(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    endpoint = f"ipc://{run_folder}/w"
    worker, seen = Worker(endpoint), list[StepOutputs]()
    client = WorkerClient(seen.append)
    intruder = zmq.Context.instance().socket(zmq.DEALER)
    intruder.connect(endpoint)
    async with running(worker.server, client):
        with caplog.at_level(logging.WARNING):
            for frames in ([b"\xff\xff"], [b""], [b"a", b"b"], [b"\x82\xa4type\xa6submit\xa1x\x01"]):
                intruder.send_multipart(frames)
            await eventually(lambda: worker.server.undecodable_count == 4)
        assert caplog.text.count("was dropped") == 4
        client.connect("w", endpoint)
        await client.ask("w", Question.SNAPSHOT)
        worker.server._socket.send_multipart([worker.received[0][0], b"\xc1"])
        await eventually(lambda: client.undecodable_count == 1)
    intruder.close(linger=0)


async def test_a_failing_handler_costs_its_message_only(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    received: list[ToWorker] = []

    def handle(peer: PeerId, message: ToWorker) -> None:
        if message == Cancel("bad"):
            raise RuntimeError("a bug")
        received.append(message)

    server = WorkerServer(f"ipc://{run_folder}/w", handle)
    client = WorkerClient(lambda _: None)
    async with running(server, client):
        client.connect("w", f"ipc://{run_folder}/w")
        client.send("w", Cancel("bad"))
        client.send("w", Cancel("good"))
        await eventually(lambda: received == [Cancel("good")])
    assert "a bug" in caplog.text


async def test_empty_outputs_are_not_passed_on(run_folder: Path) -> None:
    worker, seen = Worker(f"ipc://{run_folder}/w"), list[StepOutputs]()
    client = WorkerClient(seen.append)
    async with running(worker.server, client):
        client.connect("w", f"ipc://{run_folder}/w")
        await client.ask("w", Question.SNAPSHOT)
        peer = worker.received[0][0]
        assert worker.server.send(peer, StepOutputs("w", 1, 1, []))
        assert worker.server.send(peer, outputs(2))
        await eventually(lambda: seen)
        assert [report.step for report in seen] == [2]


async def test_the_last_message_arrives_although_the_server_closes(run_folder: Path) -> None:
    worker, seen = Worker(f"ipc://{run_folder}/w"), list[StepOutputs]()
    client = WorkerClient(seen.append)
    async with running(client):
        async with running(worker.server):
            client.connect("w", f"ipc://{run_folder}/w")
            await client.ask("w", Question.SNAPSHOT)
            for step in range(100):
                worker.server.send(worker.received[0][0], outputs(step))
        assert not worker.server.send(worker.received[0][0], outputs(1))
        await eventually(lambda: len(seen) == 100)


async def test_an_endpoint_that_cannot_be_bound_is_a_configuration_error(run_folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be bound"):
        WorkerServer(f"ipc://{run_folder}/missing/w", lambda peer, message: None)
    client = WorkerClient(lambda _: None)
    with pytest.raises(WorkerLost, match="cannot be reached"):
        client.connect("w", "nonsense://x")
