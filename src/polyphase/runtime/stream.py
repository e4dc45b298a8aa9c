"""The event stream: each worker publishes what it caches and how loaded it is; listeners follow it without a gap.

The publisher never waits for a listener: what a slow one misses, it notices by the sequence number and asks for on the request channel
(`fence.py` decides when and what).
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Protocol

import msgspec
import zmq

from polyphase.core.clock import Clock, MonotonicClock
from polyphase.core.errors import PolyphaseError, WorkerLost
from polyphase.kv import Ledger
from polyphase.runtime.channel import WorkerClient, bind
from polyphase.runtime.fence import EventSink, Fetch, FetchPage, StreamCounts, StreamFence, StreamView
from polyphase.runtime.pump import SocketPump
from polyphase.runtime.recent import RecentBatches
from polyphase.wire.cards import WorkerEntry
from polyphase.wire.events import EventBatch, KvEvent, Load, MissedBatches, SnapshotPage
from polyphase.wire.requests import Question

log = logging.getLogger(__name__)

MAX_QUEUED_BATCHES = 1000  # per listener; later ones are dropped for it, and it asks for them
MAX_FETCHES = 16  # at a time and listener: a frontend that starts among hundreds of workers does not ask all at once

_encoder = msgspec.msgpack.Encoder()


class BatchSource:
    """What a worker's listeners are told, without the sockets: numbers batches, and remembers what listeners may ask for."""

    def __init__(self, worker_id: str, epoch: int, ledger: Ledger | None = None, recent: RecentBatches | None = None) -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self.sequence = 0  # of the last batch
        self.ledger = ledger or Ledger()
        self._recent = recent or RecentBatches()

    def next_batch(self, events: list[KvEvent], load: Load) -> bytes:
        """What of these events changes nothing is left out."""
        effective = self.ledger.apply(events) if events else events
        self.sequence += 1
        batch = EventBatch(self.worker_id, self.epoch, self.sequence, effective, load, self.ledger.digests())
        data = _encoder.encode(batch)
        self._recent.add(self.sequence, data)
        return data

    def page(self, cursor: str | None) -> SnapshotPage:
        """Raises: ValueError for a cursor that no page named. Cost: below 3 ms, whatever is held."""
        blocks, following = self.ledger.page(cursor)
        return SnapshotPage(self.worker_id, self.epoch, self.sequence, blocks, following)

    def missed(self, after: int) -> MissedBatches:
        return MissedBatches(self.worker_id, self.epoch, [msgspec.Raw(data) for data in self._recent.after(after)])


class EventPublisher:
    """A worker's end. Whoever owns it publishes at least once a second, if only the load."""

    def __init__(self, endpoint: str, worker_id: str, epoch: int) -> None:
        """Raises: ConfigurationError if the endpoint cannot be bound."""
        self.source = BatchSource(worker_id, epoch)
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, MAX_QUEUED_BATCHES)
        bind(self._socket, endpoint)

    def publish(self, events: list[KvEvent], load: Load) -> None:
        """Send the next batch to whoever listens; returns at once."""
        data = self.source.next_batch(events, load)
        try:
            self._socket.send(data, zmq.NOBLOCK)
        except zmq.Again:  # PUB drops for slow listeners instead; the sequence number tells them in any case
            log.warning("event batch %d was dropped for all listeners", self.source.sequence)

    def close(self) -> None:
        """Idempotent."""
        self._socket.close(linger=0)


class History(Protocol):
    """Answers about the past of a worker's stream. Raises: PolyphaseError if there are none."""

    async def page(self, worker_id: str, cursor: str | None) -> SnapshotPage: ...

    async def missed(self, worker_id: str, after: int) -> MissedBatches: ...


class AskedHistory:
    """Asks the worker on the request channel."""

    def __init__(self, client: WorkerClient) -> None:
        self._client = client

    async def page(self, worker_id: str, cursor: str | None) -> SnapshotPage:
        answer = await self._client.ask(worker_id, Question.SNAPSHOT, cursor=cursor)
        if isinstance(answer, SnapshotPage):
            return answer
        raise WorkerLost(f"worker {worker_id} answered the question for a snapshot with {type(answer).__name__}")

    async def missed(self, worker_id: str, after: int) -> MissedBatches:
        answer = await self._client.ask(worker_id, Question.BATCHES, after=after)
        if isinstance(answer, MissedBatches):
            return answer
        raise WorkerLost(f"worker {worker_id} answered the question for missed batches with {type(answer).__name__}")


class EventSubscriber:
    """A listener's end, for many workers. Used on one event loop; whoever watches the registry calls `connect` and `disconnect`."""

    def __init__(self, sink: EventSink, history: History, clock: Clock | None = None) -> None:
        self._sink = sink
        self._history = history
        self._clock = clock or MonotonicClock()
        self._decoder = msgspec.msgpack.Decoder(EventBatch)
        self._fences: dict[str, StreamFence] = {}
        self._endpoints: dict[str, str] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._fetching = asyncio.Semaphore(MAX_FETCHES)
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, MAX_QUEUED_BATCHES)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket = socket
        self._pump: SocketPump[bytes] = SocketPump(socket, partial(socket.recv, zmq.NOBLOCK), self._receive)
        self.undecodable_count = 0

    def connect(self, entry: WorkerEntry) -> None:
        """Follow this life of the worker, which can be asked already. An earlier one is forgotten; the same one again changes nothing."""
        fence = self._fences.get(entry.worker_id)
        if fence is not None and fence.epoch == entry.epoch:
            return
        self.disconnect(entry.worker_id)
        fence = self._fences[entry.worker_id] = StreamFence(entry.worker_id, entry.epoch, self._sink)
        self._endpoints[entry.worker_id] = entry.event_endpoint
        self._socket.connect(entry.event_endpoint)
        self._pump.after_send()  # connecting, too, may swallow the news of input
        if self._tasks is not None:
            self._start(fence, fence.begin(self._clock.now_ns()))

    def disconnect(self, worker_id: str) -> None:
        """Unknown ids are ignored. What is being fetched of it is dropped."""
        self._fences.pop(worker_id, None)
        endpoint = self._endpoints.pop(worker_id, None)
        if endpoint is not None:
            try:
                self._socket.disconnect(endpoint)
            except zmq.ZMQError as error:  # ZeroMQ may have given it up before
                log.debug("disconnecting from %s: %s", endpoint, error)
            self._pump.after_send()

    def is_synced(self, worker_id: str) -> bool:
        """Whether the sink knows exactly what this worker published last."""
        fence = self._fences.get(worker_id)
        return fence is not None and fence.is_synced

    def counts(self, worker_id: str) -> StreamCounts:
        """What became of the stream of this worker's present life; all 0 for one that is not followed."""
        fence = self._fences.get(worker_id)
        return StreamCounts() if fence is None else fence.counts

    def streams(self) -> dict[str, StreamView]:
        """Of all workers that are followed."""
        return {worker_id: StreamView(fence.is_synced, fence.counts) for worker_id, fence in self._fences.items()}

    def _receive(self, data: bytes) -> None:
        batch = self._decoded(data)
        fence = None if batch is None else self._fences.get(batch.worker_id)
        if batch is not None and fence is not None:
            self._start(fence, fence.on_batch(batch, self._clock.now_ns()))

    def _decoded(self, data: bytes | msgspec.Raw) -> EventBatch | None:
        try:
            return self._decoder.decode(data)
        except msgspec.DecodeError as error:
            self.undecodable_count += 1
            log.warning("an event batch was dropped: %s", error)
            return None

    def _start(self, fence: StreamFence, fetch: Fetch | None) -> None:
        if fetch is None:
            return
        if self._tasks is None:
            fence.on_fetch_failed()
            return
        self._tasks.create_task(self._fetch(fence, fetch), name=f"history-{fence.worker_id}")

    async def _fetch(self, fence: StreamFence, fetch: Fetch) -> None:
        """One thing after the other, as long as the fence wants more. Between pages others have their turn."""
        async with self._fetching:
            wanted: Fetch | None = fetch
            while wanted is not None and self._fences.get(fence.worker_id) is fence:
                try:
                    wanted = await self._fetch_one(fence, wanted)
                except PolyphaseError as error:
                    log.info("the stream of worker %s cannot be mended yet: %s", fence.worker_id, error)
                    fence.on_fetch_failed()
                    return

    async def _fetch_one(self, fence: StreamFence, wanted: Fetch) -> Fetch | None:
        if isinstance(wanted, FetchPage):
            page = await self._history.page(fence.worker_id, wanted.cursor)
            is_current = self._fences.get(fence.worker_id) is fence
            return fence.on_page(page, self._clock.now_ns()) if is_current else None
        missed = await self._history.missed(fence.worker_id, wanted.after)
        if self._fences.get(fence.worker_id) is not fence:
            return None
        batches = [batch for data in missed.batches if (batch := self._decoded(data)) is not None]
        return fence.on_missed(batches, self._clock.now_ns())

    async def run(self) -> None:
        """Receive until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            self._pump.attach()
            try:
                await asyncio.Event().wait()
            finally:
                self._pump.detach()
                self._tasks = None

    def close(self) -> None:
        """Idempotent."""
        self._pump.detach()
        self._fences.clear()
        self._endpoints.clear()
        self._socket.close(linger=0)
