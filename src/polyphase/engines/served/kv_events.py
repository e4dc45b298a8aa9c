"""Listens to the KV events of vLLM and SGLang: every batch once and in order, those that were missed asked for again.

    SUB     [topic][sequence, 8 bytes big-endian][msgpack]      from the engine, without end
    DEALER  [][start, 8 bytes] ──►  ◄── [][topic][sequence][msgpack] … [][][ff × 8][]      what it keeps of the past; older ones: no topic

Batches are numbered from 0 in each life of the engine. At a gap the missing ones are asked for; those that are kept no more are lost, and
with them the knowledge of what the engine holds: everything is forgotten and learnt anew. A batch with a number that is past already, but
published later than the last one, is of a new life.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import httpx
import zmq
import zmq.asyncio

from polyphase.core.errors import WireError
from polyphase.engines.served.dialect import Sink
from polyphase.engines.served.kv_translation import Batch, Translator, decode_batch
from polyphase.wire.events import KvEvent

log = logging.getLogger(__name__)

REPLAY_TIMEOUT_S = 3.0
LOOPBACK = ("tcp://127.", "tcp://localhost:", "tcp://[::1]:")
_END = (-1).to_bytes(8, "big", signed=True)


class EventOrder:
    """What to do with a batch of this number: pure, so that gaps are tested without sockets."""

    def __init__(self) -> None:
        self.next = 0
        self.last_time_s = float("-inf")

    def missing_before(self, sequence: int) -> bool:
        return sequence > self.next

    def is_news(self, sequence: int) -> bool:
        return sequence >= self.next

    def is_new_life(self, sequence: int, batch: Batch) -> bool:
        return sequence < self.next and batch.time_s > self.last_time_s

    def note(self, sequence: int, batch: Batch) -> None:
        self.next, self.last_time_s = sequence + 1, batch.time_s

    def begin_anew(self) -> None:
        self.next, self.last_time_s = 0, float("-inf")


class KvEventObserver:
    """Implements `Observer`. The translator outlives `watch`, and so does the place in the stream."""

    def __init__(self, endpoint: str, replay_endpoint: str | None, topic: str, block_size: int) -> None:
        """Endpoints as seen from here; the engine binds the second, and the first or not (`meet`)."""
        self._endpoint = endpoint
        self._replay_endpoint = replay_endpoint
        self._topic = topic
        self.translator = Translator(block_size)
        self.order = EventOrder()
        self.gap_count = 0

    async def watch(self, client: httpx.AsyncClient, sink: Sink) -> None:
        """Begins with all that the engine remembers, so that one which ran before us is known too."""
        with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as socket:
            socket.linger = 0
            socket.rcvhwm = 0  # a slow reader loses nothing that memory can hold
            socket.subscribe(self._topic)
            meet(socket, self._endpoint)
            await self._catch_up(context, sink)
            while True:
                frames = await socket.recv_multipart()
                try:
                    await self._take(context, frames, sink)
                except WireError as error:
                    log.warning("KV events are left out: %s", error.message)

    async def _take(self, context: zmq.asyncio.Context, frames: Sequence[bytes], sink: Sink) -> None:
        sequence, batch = parse_frames(frames)
        if self.order.is_new_life(sequence, batch):
            log.warning("the engine numbers its KV events anew: it was started again, and what it held is forgotten")
            self.order.begin_anew()
            sink.note_events(self.translator.clear())
        if self.order.missing_before(sequence):
            self.gap_count += 1
            await self._catch_up(context, sink)
            if self.order.missing_before(sequence):
                log.warning("KV events %d to %d are lost; what the engine holds is learnt anew", self.order.next, sequence - 1)
                sink.note_events(self.translator.clear())
        if self.order.is_news(sequence):
            self._apply(sequence, batch, sink)

    def _apply(self, sequence: int, batch: Batch, sink: Sink) -> None:
        self.order.note(sequence, batch)
        events: list[KvEvent] = self.translator.translate(batch)
        if events:
            sink.note_events(events)

    async def _catch_up(self, context: zmq.asyncio.Context, sink: Sink) -> None:
        """Apply what the engine still has, from where we are."""
        if self._replay_endpoint is None:
            return
        first = self.order.next
        replayed = await self._replay(context, first)
        if replayed and replayed[0][0] > first:
            log.warning("the engine keeps its KV events from number %d on; blocks stored before are not known", replayed[0][0])
            sink.note_events(self.translator.clear())
        for sequence, batch in replayed:
            if self.order.is_news(sequence):
                self._apply(sequence, batch, sink)

    async def _replay(self, context: zmq.asyncio.Context, first: int) -> list[tuple[int, Batch]]:
        found: list[tuple[int, Batch]] = []
        assert self._replay_endpoint is not None
        with context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.rcvhwm = 0
            socket.connect(self._replay_endpoint)
            try:
                await socket.send_multipart([b"", first.to_bytes(8, "big")])
                while True:
                    async with asyncio.timeout(REPLAY_TIMEOUT_S):
                        frames = await socket.recv_multipart()
                    body = frames[1:] if frames and not frames[0] else frames
                    if len(body) >= 2 and body[-2] == _END:
                        return found
                    found.append(parse_frames(body))
            except TimeoutError:
                log.warning("the engine does not answer the question for its past KV events within %.0f s", REPLAY_TIMEOUT_S)
            except WireError as error:
                log.warning("past KV events are left out: %s", error.message)
        return found


def parse_frames(frames: Sequence[bytes]) -> tuple[int, Batch]:
    """Number and content; the topic may be missing. Raises: WireError."""
    if len(frames) not in (2, 3) or len(frames[-2]) != 8:
        raise WireError(f"a message of {len(frames)} frames is no batch of KV events")
    return int.from_bytes(frames[-2], "big"), decode_batch(frames[-1])


def meet(socket: zmq.asyncio.Socket, endpoint: str) -> None:
    """Connect, or bind where the engine connects: to TCP endpoints that name an address.

    Whether it does cannot be seen: it may have bound any port, and then told which. If the port is free, it has not.
    Source: vLLM's `ZmqEventPublisher._is_bind_endpoint`, and SGLang's.
    """
    if endpoint.startswith(LOOPBACK):
        try:
            socket.bind(endpoint.replace("tcp://localhost:", "tcp://127.0.0.1:"))
        except zmq.ZMQError as error:
            log.debug("KV events at %s: %s, so the engine has bound it", endpoint, error)
        else:
            return
    socket.connect(endpoint)


def connectable(endpoint: str, host: str) -> str:
    """Where to connect for what the engine binds: `tcp://*:5557` is `tcp://HOST:5557` from outside."""
    for everywhere in ("*", "0.0.0.0", "[::]", "::"):
        prefix = f"tcp://{everywhere}:"
        if endpoint.startswith(prefix):
            return f"tcp://{f'[{host}]' if ':' in host else host}:{endpoint.removeprefix(prefix)}"
    return endpoint
