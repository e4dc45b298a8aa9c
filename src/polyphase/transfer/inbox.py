"""Notifications from peers. Whoever waits for one sleeps on the sockets themselves, so no thread of the library stands in between."""

from __future__ import annotations

import asyncio
import contextlib
import select
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from polyphase.core.errors import HandleReleased, PeerLost, TransferError, TransferTimeout, WireError
from polyphase.wire.transfer import MAX_NOTIFICATION_BYTES, AgentCard, decode_frame, encode_frame, frame_length
from polyphase.wire.transfer import Notification as NotificationFrame

RECEIVE_BYTES = 256 << 10


class Mailbox:
    """One peer's notification socket: either side may send. Any thread; owner: the session or the guest, by `close`."""

    def __init__(self, sock: socket.socket, peer: AgentCard, on_gone: Callable[[Mailbox], None]) -> None:
        sock.setblocking(False)
        self.on_gone = on_gone
        self.socket = sock
        self.peer = peer
        self._pending = bytearray()
        self._sending = threading.Lock()

    def send(self, payload: bytes, timeout_s: float) -> None:
        """Raises: PeerLost, TransferTimeout if the peer does not read for so long."""
        data = memoryview(encode_frame(NotificationFrame(payload)))
        with self._sending:
            while data:
                try:
                    data = data[self.socket.send(data) :]
                except BlockingIOError:
                    if not select.select([], [self.socket], [], timeout_s)[1]:
                        self.socket.shutdown(socket.SHUT_RDWR)  # half a notification may have gone: nothing can follow it
                        raise TransferTimeout(f"agent {self.peer.agent_id} has not read its notifications for {timeout_s} s") from None
                except (OSError, ValueError) as error:
                    raise PeerLost(f"agent {self.peer.agent_id} cannot be notified: {error}") from error

    def receive(self) -> list[bytes]:
        """What has arrived whole. Raises: PeerLost at the end, WireError."""
        try:
            data = self.socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise PeerLost(str(error)) from error
        if not data:
            raise PeerLost(f"agent {self.peer.agent_id} has gone")
        self._pending += data
        payloads: list[bytes] = []
        start = 0
        while len(self._pending) - start >= 4:
            end = start + 4 + frame_length(bytes(self._pending[start : start + 4]))
            if len(self._pending) < end:
                break
            frame = decode_frame(bytes(self._pending[start + 4 : end]))
            if not isinstance(frame, NotificationFrame):
                raise WireError(f"a {type(frame).__name__} frame came where notifications are expected")
            payloads.append(frame.payload)
            start = end
        del self._pending[:start]
        return payloads

    def close(self) -> None:
        self.socket.close()


def check_payload(payload: bytes) -> None:
    """Raises: TransferError if a notification cannot carry it."""
    if len(payload) > MAX_NOTIFICATION_BYTES:
        raise TransferError(f"a notification of {len(payload)} bytes cannot be sent; {MAX_NOTIFICATION_BYTES} is the most")


class Sender(Protocol):
    """The way back to whoever sent a notification."""

    def send(self, payload: bytes, timeout_s: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Notification:
    """`sender` is the card of the agent that sent it, without its regions."""

    sender: AgentCard
    payload: bytes
    _mailbox: Sender = field(repr=False)

    def reply(self, payload: bytes, timeout_s: float = 5.0) -> None:
        """Back along the same connection. Raises: as `Session.notify`."""
        check_payload(payload)
        self._mailbox.send(payload, timeout_s)


class Inbox:
    """All notifications that reach one agent, in order for each sender. Any thread; several may wait."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._waiting = threading.Lock()
        self._arrived: deque[Notification] = deque()
        self._stop, self._bell = socket.socketpair()
        self._selector.register(self._bell, selectors.EVENT_READ, None)
        self._is_closed = False

    def add(self, mailbox: Mailbox) -> None:
        with contextlib.suppress(ValueError, OSError):  # closed at the same time
            self._selector.register(mailbox.socket, selectors.EVENT_READ, mailbox)

    def remove(self, mailbox: Mailbox) -> None:
        """Idempotent; before the mailbox is closed."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(mailbox.socket)

    def deliver(self, notification: Notification) -> None:
        """For backends that carry notifications themselves."""
        self._arrived.append(notification)
        with contextlib.suppress(OSError):
            self._stop.send(b"\1")

    def poll(self) -> Notification | None:
        """The next one, if it is here. Raises: HandleReleased after the agent's end."""
        return self._next(0.0)

    def get(self, timeout_s: float | None = None) -> Notification:
        """The next one. Raises: TransferTimeout; HandleReleased if the agent is closed, also meanwhile."""
        notification = self._next(timeout_s)
        if notification is None:
            raise TransferTimeout(f"no notification came within {timeout_s} s")
        return notification

    async def next(self) -> Notification:
        """The next one, on an event loop. Cancel: nothing is lost. Raises: HandleReleased."""
        loop = asyncio.get_running_loop()
        while (notification := self.poll()) is None:
            readable = loop.create_future()
            loop.add_reader(self._selector.fileno(), _settle, readable)
            try:
                await readable
            finally:
                loop.remove_reader(self._selector.fileno())
        return notification

    def _next(self, timeout_s: float | None) -> Notification | None:
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = None if end_s is None else max(0.0, end_s - time.monotonic())
            if not self._waiting.acquire(timeout=-1 if left_s is None else left_s):
                return None
            try:
                if self._is_closed:
                    raise HandleReleased("the agent is closed, and with it its inbox")
                if self._arrived:
                    return self._arrived.popleft()
                for key, _ in self._selector.select(left_s):
                    self._collect(key.data)
                if self._arrived and not self._is_closed:
                    return self._arrived.popleft()
            finally:
                self._waiting.release()
            if end_s is not None and time.monotonic() >= end_s and not self._is_closed:
                return None

    def _collect(self, mailbox: Mailbox | None) -> None:
        if mailbox is None:
            if not self._is_closed:
                self._bell.recv(4096)
            return
        try:
            self._arrived.extend(Notification(mailbox.peer, payload, mailbox) for payload in mailbox.receive())
        except (PeerLost, WireError):
            self.remove(mailbox)
            mailbox.close()
            mailbox.on_gone(mailbox)

    def close(self) -> None:
        """Whoever waits is told. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._stop.close()  # wakes every waiter, again and again
        with self._waiting:
            self._selector.close()
            self._bell.close()


def _settle(readable: asyncio.Future[None]) -> None:
    if not readable.done():
        readable.set_result(None)
