"""Feeds what a ZeroMQ socket receives to a function, on the event loop, many messages per wake-up.

ZeroMQ's file descriptor only says that *something* happened since the socket was last used, and sending uses it too. So whoever sends
looks for input afterwards (`after_send`), and a wake-up takes what there is until there is no more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Generic, TypeVar

import zmq

log = logging.getLogger(__name__)

MAX_MESSAGES_PER_TURN = 256  # then others on the loop have a turn
_POLLIN = int(zmq.POLLIN)  # arithmetic on the enumeration itself costs more than the system call

Message = TypeVar("Message")


class SocketPump(Generic[Message]):
    """Reads one socket while attached. An exception of the receiver is logged and costs that message only."""

    def __init__(self, socket: zmq.Socket[bytes], read: Callable[[], Message], receive: Callable[[Message], None]) -> None:
        """`read` takes one message from the socket without waiting; `receive` gets it."""
        self._socket = socket
        self._read = read
        self._fd = int(socket.getsockopt(zmq.FD))
        self._receive = receive
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_scheduled = False

    def attach(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._drain)
        self._schedule()

    def detach(self) -> None:
        """Stop reading; to be called before the socket is closed. Idempotent."""
        if self._loop is not None:
            self._loop.remove_reader(self._fd)
            self._loop = None

    def after_send(self) -> None:
        if self._has_input():
            self._schedule()

    def _has_input(self) -> bool:
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & _POLLIN)

    def _schedule(self) -> None:
        if self._loop is not None and not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._drain_scheduled)

    def _drain_scheduled(self) -> None:
        self._is_scheduled = False
        self._drain()

    def _drain(self) -> None:
        for _ in range(MAX_MESSAGES_PER_TURN):
            if self._loop is None or not self._has_input():  # perhaps detached by the receiver
                return
            message = self._read()
            try:
                self._receive(message)
            except Exception:
                log.exception("a message could not be dealt with")
        self._schedule()
