"""The event stream: each worker publishes what it caches and how loaded it is; listeners follow it without a gap, or fetch a snapshot.

The publisher never waits for a listener: what a slow one misses, it notices by the sequence number (`fence.py` decides what then).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec
import zmq

from polyphase.core.errors import PolyphaseError
from polyphase.runtime.channel import bind
from polyphase.runtime.fence import EventSink, StreamFence
from polyphase.runtime.pump import SocketPump
from polyphase.wire.cards import WorkerEntry
from polyphase.wire.events import EventBatch, KvEvent, Load
from polyphase.wire.requests import Snapshot

log = logging.getLogger(__name__)

MAX_QUEUED_BATCHES = 1000  # per listener; later ones are dropped for it, which costs it a snapshot

_encoder = msgspec.msgpack.Encoder()


class EventPublisher:
    """A worker's end. Whoever owns it publishes at least once a second, if only the load."""

    def __init__(self, endpoint: str, worker_id: str, epoch: int) -> None:
        """Raises: ConfigurationError if the endpoint cannot be bound."""
        self._worker_id = worker_id
        self._epoch = epoch
        self.sequence = 0  # of the last published batch
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, MAX_QUEUED_BATCHES)
        bind(self._socket, endpoint)

    def publish(self, events: list[KvEvent], load: Load) -> None:
        """Send the next batch to whoever listens; returns at once."""
        self.sequence += 1
        batch = EventBatch(self._worker_id, self._epoch, self.sequence, events, load)
        try:
            self._socket.send(_encoder.encode(batch), zmq.NOBLOCK)
        except zmq.Again:  # PUB drops for slow listeners instead; the sequence number tells them in any case
            log.warning("event batch %d was dropped for all listeners", self.sequence)

    def close(self) -> None:
        """Idempotent."""
        self._socket.close(linger=0)


class EventSubscriber:
    """A listener's end, for many workers. Used on one event loop; whoever watches the registry calls `connect` and `disconnect`."""

    def __init__(self, sink: EventSink, fetch_snapshot: Callable[[str], Awaitable[Snapshot]]) -> None:
        """`fetch_snapshot` asks a worker by its id; if it raises a PolyphaseError, the next batch leads to another attempt."""
        self._sink = sink
        self._fetch_snapshot = fetch_snapshot
        self._decoder = msgspec.msgpack.Decoder(EventBatch)
        self._fences: dict[str, StreamFence] = {}
        self._endpoints: dict[str, str] = {}
        self._tasks: asyncio.TaskGroup | None = None
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, MAX_QUEUED_BATCHES)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket = socket
        self._pump: SocketPump[bytes] = SocketPump(socket, partial(socket.recv, zmq.NOBLOCK), self._receive)
        self.undecodable_count = 0

    def connect(self, entry: WorkerEntry) -> None:
        """Follow this life of the worker; an earlier one is forgotten. For the same life again, nothing happens."""
        fence = self._fences.get(entry.worker_id)
        if fence is not None and fence.epoch == entry.epoch:
            return
        self.disconnect(entry.worker_id)
        self._fences[entry.worker_id] = StreamFence(entry.worker_id, entry.epoch, self._sink)
        self._endpoints[entry.worker_id] = entry.event_endpoint
        self._socket.connect(entry.event_endpoint)
        self._pump.after_send()  # connecting, too, may swallow the news of input

    def disconnect(self, worker_id: str) -> None:
        """Unknown ids are ignored. A snapshot that is on its way is dropped."""
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

    def repair_count(self, worker_id: str) -> int:
        """How often this life's stream had to be mended by a snapshot after it had been whole."""
        fence = self._fences.get(worker_id)
        return 0 if fence is None else fence.gap_count

    def _receive(self, data: bytes) -> None:
        try:
            batch = self._decoder.decode(data)
        except msgspec.DecodeError as error:
            self.undecodable_count += 1
            log.warning("an event batch was dropped: %s", error)
            return
        fence = self._fences.get(batch.worker_id)
        if fence is not None and fence.on_batch(batch):
            self._start_fetch(fence)

    def _start_fetch(self, fence: StreamFence) -> None:
        if self._tasks is None:
            fence.on_fetch_failed()
            return
        self._tasks.create_task(self._fetch(fence), name=f"snapshot-{fence.worker_id}")

    async def _fetch(self, fence: StreamFence) -> None:
        wants_snapshot = True
        while wants_snapshot:
            try:
                snapshot = await self._fetch_snapshot(fence.worker_id)
            except PolyphaseError as error:
                log.info("no snapshot of worker %s yet: %s", fence.worker_id, error)
                fence.on_fetch_failed()
                return
            if self._fences.get(fence.worker_id) is not fence:
                return
            wants_snapshot = fence.on_snapshot(snapshot)

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
