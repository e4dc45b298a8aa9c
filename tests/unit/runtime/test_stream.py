"""Events travel from publishers to a listener over real sockets, with snapshots where the listener came late."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import zmq

from polyphase.core.errors import WorkerLost
from polyphase.runtime import EventPublisher, EventSubscriber
from polyphase.wire.cards import Role, WorkerEntry
from polyphase.wire.events import BlocksStored, Load, MissedBatches, SnapshotPage, Tier
from tests.unit.runtime.waiting import eventually
from tests.unit.runtime.world import Mirror


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


class Memory:
    """A `History` that asks a publisher in the same process; its first answer is a failure."""

    def __init__(self, publisher: EventPublisher) -> None:
        self.publisher = publisher
        self.attempts = 0

    async def page(self, worker_id: str, cursor: str | None) -> SnapshotPage:
        self.attempts += 1
        if self.attempts == 1:
            raise WorkerLost("not now")
        return self.publisher.source.page(cursor)

    async def missed(self, worker_id: str, after: int) -> MissedBatches:
        return self.publisher.source.missed(after)


async def test_a_late_listener_catches_up_and_follows_the_next_life(run_folder: Path) -> None:
    mirror = Mirror()
    publisher = EventPublisher(entry(run_folder).event_endpoint, "w", 1)
    memory = Memory(publisher)

    def publish(number: int) -> bool:
        memory.publisher.publish([BlocksStored([number])], Load(step=memory.publisher.source.sequence))
        return subscriber.is_synced("w")

    def is_equal() -> bool:
        return mirror.held[Tier.DEVICE] == memory.publisher.source.ledger.held()

    subscriber = EventSubscriber(mirror, memory)
    for number in range(5):
        publish(number)
    task = asyncio.create_task(subscriber.run())
    await asyncio.sleep(0)
    subscriber.connect(entry(run_folder))
    subscriber.connect(entry(run_folder))
    numbers = iter(range(5, 10_000))
    await eventually(lambda: publish(next(numbers)))
    await eventually(is_equal)
    assert memory.attempts >= 2
    assert subscriber.counts("w").snapshots == 1
    publish(20_000)
    await eventually(lambda: 20_000 in mirror.held[Tier.DEVICE])

    publisher.close()
    publisher.close()
    memory.publisher = EventPublisher(entry(run_folder).event_endpoint, "w", 2)
    mirror.step = -1
    subscriber.connect(entry(run_folder, epoch=2))
    assert not subscriber.is_synced("w")
    await eventually(lambda: publish(next(numbers)))
    await eventually(is_equal)
    assert 20_000 not in mirror.held[Tier.DEVICE]

    subscriber.disconnect("w")
    subscriber.disconnect("w")
    assert not subscriber.is_synced("w")
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    subscriber.close()
    subscriber.close()
    memory.publisher.close()


async def test_a_new_listener_knows_all_without_waiting_for_a_batch(run_folder: Path) -> None:
    mirror = Mirror()
    publisher = EventPublisher(entry(run_folder).event_endpoint, "w", 1)
    publisher.publish([BlocksStored([1, 2]), BlocksStored([3], Tier.DISK)], Load())
    memory = Memory(publisher)
    memory.attempts = 1
    subscriber = EventSubscriber(mirror, memory)
    task = asyncio.create_task(subscriber.run())
    await asyncio.sleep(0)
    subscriber.connect(entry(run_folder))
    await eventually(lambda: subscriber.is_synced("w"))
    assert (mirror.held[Tier.DEVICE], mirror.held[Tier.DISK]) == ({1, 2}, {3})
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    subscriber.close()
    publisher.close()


async def test_what_does_not_decode_is_counted(run_folder: Path) -> None:
    intruder = zmq.Context.instance().socket(zmq.PUB)
    intruder.bind(entry(run_folder).event_endpoint)

    publisher = EventPublisher(f"ipc://{run_folder}/nobody.ev", "w", 1)
    subscriber = EventSubscriber(Mirror(), Memory(publisher))
    task = asyncio.create_task(subscriber.run())
    subscriber.connect(entry(run_folder))
    await eventually(lambda: intruder.send(b"\xc1nonsense") or subscriber.undecodable_count)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    subscriber.close()
    intruder.close(linger=0)
    publisher.close()
