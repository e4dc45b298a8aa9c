"""Events travel from publishers to a listener over real sockets, with snapshots where the listener came late."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import zmq

from polyphase.core.errors import WorkerLost
from polyphase.runtime import EventPublisher, EventSubscriber
from polyphase.wire.cards import Role, WorkerEntry
from polyphase.wire.events import BlocksStored, Load
from polyphase.wire.requests import Snapshot
from tests.unit.runtime.test_fence import Mirror
from tests.unit.runtime.waiting import eventually


def entry(run_folder: Path, epoch: int = 1) -> WorkerEntry:
    return WorkerEntry(
        worker_id="w",
        epoch=epoch,
        role=Role.DECODE,
        model="m",
        pid=1,
        host="h",
        request_endpoint="",
        event_endpoint=f"ipc://{run_folder}/w.ev",
    )


async def test_a_late_listener_catches_up_and_follows_the_next_life(run_folder: Path) -> None:
    mirror = Mirror()
    publisher = EventPublisher(entry(run_folder).event_endpoint, "w", 1)
    held: list[int] = []
    attempts = 0

    async def fetch(worker_id: str) -> Snapshot:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise WorkerLost("not now")
        return Snapshot("w", publisher._epoch, publisher.sequence, list(held))

    def publish(number: int) -> bool:
        held.append(number)
        publisher.publish([BlocksStored([number])], Load(step=publisher.sequence))
        return mirror.held == set(held)

    for number in range(5):
        publish(number)
    subscriber = EventSubscriber(mirror, fetch)
    task = asyncio.create_task(subscriber.run())
    subscriber.connect(entry(run_folder))
    subscriber.connect(entry(run_folder))
    numbers = iter(range(5, 10_000))
    await eventually(lambda: publish(next(numbers)) or subscriber.is_synced("w"))
    await eventually(lambda: mirror.held == set(held))
    assert attempts >= 2
    publish(20_000)
    await eventually(lambda: 20_000 in mirror.held)

    publisher.close()
    publisher.close()
    publisher = EventPublisher(entry(run_folder).event_endpoint, "w", 2)
    held.clear()
    subscriber.connect(entry(run_folder, epoch=2))
    assert not subscriber.is_synced("w")
    await eventually(lambda: publish(next(numbers)) or subscriber.is_synced("w"))
    await eventually(lambda: mirror.held == set(held))

    subscriber.disconnect("w")
    subscriber.disconnect("w")
    assert not subscriber.is_synced("w")
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    subscriber.close()
    subscriber.close()
    publisher.close()


async def test_what_does_not_decode_is_counted(run_folder: Path) -> None:
    intruder = zmq.Context.instance().socket(zmq.PUB)
    intruder.bind(entry(run_folder).event_endpoint)

    async def fetch(worker_id: str) -> Snapshot:
        raise AssertionError

    subscriber = EventSubscriber(Mirror(), fetch)
    task = asyncio.create_task(subscriber.run())
    subscriber.connect(entry(run_folder))
    await eventually(lambda: intruder.send(b"\xc1nonsense") or subscriber.undecodable_count)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    subscriber.close()
    intruder.close(linger=0)
