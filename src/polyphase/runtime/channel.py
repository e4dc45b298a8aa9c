"""The request channel: a ZeroMQ ROUTER at each worker, a DEALER of each peer (frontend, other worker, command line) for each worker.

Queues are bounded. A peer whose queue at the worker is full, or which has gone, is told to the worker by what `send` returns: its
requests are then aborted. A worker whose queue at a peer is full raises `WorkerLost` there. Nothing is sent again; messages that do not
decode are logged, counted and dropped.

A connection that breaks may have swallowed messages in both directions. ZeroMQ would mend it and say nothing; so each is watched, and
`on_cut` tells its owner, who connects anew, as another peer. ZeroMQ's own attempt comes too late to be used by then.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NewType

import msgspec
import zmq

from polyphase.core.clock import Clock, MonotonicClock
from polyphase.core.errors import ConfigurationError, ConnectionLost, WorkerLost
from polyphase.runtime.pump import SocketPump
from polyphase.wire import offer_times
from polyphase.wire.cards import ModelCard, Role, WorkerStatus
from polyphase.wire.events import MissedBatches, SnapshotPage
from polyphase.wire.kv import KvPart
from polyphase.wire.requests import (
    Answer,
    Denied,
    FindBlocks,
    FromWorker,
    HeldBlocks,
    Query,
    Question,
    StepOutputs,
    SwitchRole,
    SwitchSleep,
    ToWorker,
)

log = logging.getLogger(__name__)

PeerId = NewType("PeerId", bytes)
AnswerBody = SnapshotPage | MissedBatches | ModelCard | WorkerStatus | HeldBlocks | Denied

MAX_QUEUED_MESSAGES = 4096  # per peer and direction: about a minute of steps of a stalled frontend
MAX_MESSAGE_BYTES = 64 << 20  # a tokenizer of 20 MB and the longest prompt fit
CLOSING_LINGER_MS = 500
RECONNECT_MS = 2000

_encoder = msgspec.msgpack.Encoder()


class Delivery(enum.Enum):
    """What became of a message to a peer; true if it is on its way."""

    QUEUED = "queued"
    NOT_READ = "not read"  # the peer's queue is full; it may read again
    GONE = "gone"

    def __bool__(self) -> bool:
        return self is Delivery.QUEUED


class WorkerServer:
    """The worker's end. `handler` is called on the loop with each message, in order per peer, and must not block."""

    def __init__(self, endpoint: str, handler: Callable[[PeerId, ToWorker], None], clock: Clock = MonotonicClock()) -> None:
        """Raises: ConfigurationError if the endpoint cannot be bound."""
        self._handler = handler
        self._decoder = msgspec.msgpack.Decoder(ToWorker)
        self._clock = clock  # by which offers end
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()  # its own, so that `close` can wait for what is on its way
        self._socket = _socket(self._context, zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            bind(self._socket, endpoint)
        except ConfigurationError:
            self._context.term()
            raise
        self._pump = SocketPump(self._socket, partial(self._socket.recv_multipart, zmq.NOBLOCK), self._receive)
        self.undecodable_count = 0

    async def run(self) -> None:
        """Serve until cancelled."""
        self._pump.attach()
        try:
            await asyncio.Event().wait()
        finally:
            self._pump.detach()

    def _receive(self, frames: list[bytes]) -> None:
        peer = PeerId(frames[0])
        try:
            if len(frames) != 2:
                raise msgspec.DecodeError(f"{len(frames)} frames instead of 2")
            message = offer_times.from_frontend(self._decoder.decode(frames[1]), self._clock.now_ns())
        except msgspec.DecodeError as error:
            self.undecodable_count += 1
            log.warning("a message of %s was dropped: %s", peer_name(peer), error)
            return
        self._handler(peer, message)

    def send(self, peer: PeerId, message: FromWorker) -> Delivery:
        """Queue a message, if that can be done now; otherwise the peer will not get it."""
        if self._socket.closed:
            return Delivery.GONE
        data = _encoder.encode(offer_times.for_frontend(message, self._clock.now_ns()))
        try:
            self._socket.send(peer, zmq.NOBLOCK | zmq.SNDMORE)  # fails here or not at all; half the cost of send_multipart
            self._socket.send(data, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return Delivery.GONE if error.errno == zmq.EHOSTUNREACH else Delivery.NOT_READ
        finally:
            self._pump.after_send()  # also after a failure, which may have swallowed the news of input
        return Delivery.QUEUED

    def close(self) -> None:
        """Last messages still go out, if their peers read them within half a second. Idempotent."""
        self._pump.detach()
        self._socket.close(linger=CLOSING_LINGER_MS)
        self._context.term()


@dataclass(slots=True)
class _Connection:
    socket: zmq.Socket[bytes]
    pump: SocketPump[bytes]
    monitor: zmq.Socket[bytes]  # tells of the connection's end
    monitor_pump: SocketPump[list[bytes]]
    questions: dict[int, asyncio.Future[AnswerBody]] = field(default_factory=dict)

    def attach(self) -> None:
        self.pump.attach()
        self.monitor_pump.attach()

    def detach(self) -> None:
        self.pump.detach()
        self.monitor_pump.detach()

    def close(self, error: WorkerLost) -> None:
        self.detach()
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=0)
        for question in self.questions.values():
            if not question.done():
                question.set_exception(error)


class WorkerClient:
    """The peer's end: connections to many workers. Used on one event loop.

    Each `connect` makes a peer of its own at the worker, so that a worker sees at once that the earlier one has gone and aborts what it
    had asked for. Whoever watches the registry calls `connect` and `disconnect`.
    """

    def __init__(
        self,
        on_outputs: Callable[[StepOutputs], None],
        name: str = "peer",
        on_cut: Callable[[str], None] | None = None,
        clock: Clock = MonotonicClock(),
    ) -> None:
        """`on_outputs` is called on the loop with each worker's outputs, in order. `name` shows in the workers' logs.

        `on_cut` is called with the id of a worker whose connection broke. What had arrived before is still delivered, later.
        """
        self._on_outputs = on_outputs
        self._on_cut = on_cut
        self._name = name
        self._decoder = msgspec.msgpack.Decoder(FromWorker)
        self._clock = clock
        self._connections: dict[str, _Connection] = {}
        self._query_ids = itertools.count(1)
        self._is_running = False
        self.undecodable_count = 0

    def connect(self, worker_id: str, endpoint: str) -> None:
        """Returns at once; what is sent before the connection stands is queued. An existing connection to this worker is replaced."""
        self.disconnect(worker_id)
        socket = _socket(zmq.Context.instance(), zmq.DEALER)
        try:
            socket.setsockopt(zmq.ROUTING_ID, f"{self._name}-{secrets.token_hex(6)}".encode())
            socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
            monitor: zmq.Socket[bytes] = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            socket.close(linger=0)
            raise WorkerLost(f"worker {worker_id} cannot be reached at {endpoint}: {error}") from error
        connection = _Connection(
            socket,
            SocketPump(socket, partial(socket.recv, zmq.NOBLOCK), partial(self._receive, worker_id)),
            monitor,
            SocketPump(monitor, partial(monitor.recv_multipart, zmq.NOBLOCK), lambda _: self._note_cut(worker_id)),
        )
        self._connections[worker_id] = connection
        if self._is_running:
            connection.attach()

    def disconnect(self, worker_id: str) -> None:
        """Questions that wait for an answer end in `WorkerLost`. Unknown ids are ignored."""
        connection = self._connections.pop(worker_id, None)
        if connection is not None:
            connection.close(WorkerLost(f"worker {worker_id} went away before it answered"))

    def _note_cut(self, worker_id: str) -> None:
        for question in self._connections[worker_id].questions.values():
            if not question.done():
                question.set_exception(ConnectionLost(f"the connection to worker {worker_id} broke before it answered"))
        if self._on_cut is not None:
            self._on_cut(worker_id)

    def is_connected(self, worker_id: str) -> bool:
        """Whether `connect` was called and `disconnect` not; the worker may be dead without anybody knowing yet."""
        return worker_id in self._connections

    def send(self, worker_id: str, message: ToWorker) -> None:
        """Queue a message.

        Raises: WorkerLost if the worker is not connected or its queue is full.
        """
        connection = self._connections.get(worker_id)
        if connection is None:
            raise WorkerLost(f"worker {worker_id} is not connected")
        try:
            connection.socket.send(_encoder.encode(offer_times.for_worker(message, self._clock.now_ns())), zmq.NOBLOCK)
        except zmq.Again:
            raise WorkerLost(f"worker {worker_id} does not take messages: {MAX_QUEUED_MESSAGES} are waiting") from None
        finally:
            connection.pump.after_send()  # also after a failure, which may have swallowed the news of input

    async def ask(
        self, worker_id: str, question: Question, timeout_s: float = 5, *, cursor: str | None = None, after: int = 0
    ) -> AnswerBody:
        """Ask a worker. `cursor` and `after` say which page of a snapshot, or which batches.

        Raises: WorkerLost if it is not connected, goes away, or does not answer in time.
        Cancel: a late answer is dropped.
        """
        query_id = next(self._query_ids)
        return await self._ask(worker_id, Query(query_id, question, cursor, after), f"the question for its {question.value}", timeout_s)

    async def switch_role(self, worker_id: str, role: Role, timeout_s: float = 5) -> WorkerStatus:
        """Give a worker another role; when this returns, it has it.

        Raises: ConfigurationError with the worker's reason if it will not; WorkerLost as `ask`.
        Cancel: the worker may have switched or not.
        """
        body = await self._ask(worker_id, SwitchRole(next(self._query_ids), role), "the request to switch its role", timeout_s)
        if isinstance(body, WorkerStatus):
            return body
        raise ConfigurationError(body.message if isinstance(body, Denied) else f"worker {worker_id} answered with {type(body).__name__}")

    async def switch_sleep(self, worker_id: str, timeout_s: float, *, is_asleep: bool) -> WorkerStatus:
        """Put a worker to sleep, or wake it; when this returns, it is.

        Raises: ConfigurationError with the worker's reason if it will not; WorkerLost as `ask`.
        Cancel: the worker goes on with it.
        """
        message = SwitchSleep(next(self._query_ids), is_asleep)
        body = await self._ask(worker_id, message, "the request to sleep" if is_asleep else "the request to wake", timeout_s)
        if isinstance(body, WorkerStatus):
            return body
        raise ConfigurationError(body.message if isinstance(body, Denied) else f"worker {worker_id} answered with {type(body).__name__}")

    async def find_blocks(self, worker_id: str, epoch: int, first_block: int, keys: list[bytes], timeout_s: float) -> KvPart:
        """Where this life of a worker has the blocks of these keys, as far as it has them.

        Raises: WorkerLost as `ask`, and if it is another life, or no other process can read its blocks.
        """
        message = FindBlocks(next(self._query_ids), epoch, first_block, keys)
        body = await self._ask(worker_id, message, "the question for its blocks", timeout_s)
        if isinstance(body, HeldBlocks):
            return body.part
        raise WorkerLost(body.message if isinstance(body, Denied) else f"worker {worker_id} answered with {type(body).__name__}")

    async def _ask(self, worker_id: str, message: Query | SwitchRole | SwitchSleep | FindBlocks, what: str, timeout_s: float) -> AnswerBody:
        query_id = message.query_id
        self.send(worker_id, message)
        questions = self._connections[worker_id].questions
        answer: asyncio.Future[AnswerBody] = asyncio.get_running_loop().create_future()
        questions[query_id] = answer
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise WorkerLost(f"worker {worker_id} did not answer {what} within {timeout_s} s") from None
        finally:
            del questions[query_id]

    def _receive(self, worker_id: str, data: bytes) -> None:
        try:
            message = offer_times.from_worker(self._decoder.decode(data), self._clock.now_ns())
        except msgspec.DecodeError as error:
            self.undecodable_count += 1
            log.warning("a message of worker %s was dropped: %s", worker_id, error)
            return
        if isinstance(message, Answer):
            connection = self._connections.get(worker_id)
            waiting = connection.questions.get(message.query_id) if connection else None
            if waiting is not None and not waiting.done():
                waiting.set_result(message.body)
        elif message.outputs:  # a worker sends empty ones to find out whether a peer is still there
            self._on_outputs(message)

    async def run(self) -> None:
        """Receive until cancelled."""
        self._is_running = True
        for connection in self._connections.values():
            connection.attach()
        try:
            await asyncio.Event().wait()
        finally:
            self._is_running = False
            for connection in self._connections.values():
                connection.detach()

    def close(self) -> None:
        """Disconnect from all workers. Idempotent."""
        for worker_id in list(self._connections):
            self.disconnect(worker_id)


def bind(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Raises: ConfigurationError if the endpoint cannot be bound; the socket is closed then."""
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        raise ConfigurationError(f"the endpoint {endpoint} cannot be bound: {error}") from error


def peer_name(peer: PeerId) -> str:
    """A peer as it shows in the log. Peers choose their ids, so only plain ones are shown as they are."""
    text = peer.decode("ascii", "backslashreplace")
    return text if text.isprintable() else peer.hex()


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, MAX_QUEUED_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, MAX_QUEUED_MESSAGES)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    return socket
