"""A relay before a TCP server that damages what passes: for tests of what must not believe the network."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable
from typing import Self

CHUNK_BYTES = 64 << 10

Tamper = Callable[[bytes], bytes | None]
"""Takes what came in one direction of one connection and returns what goes on; None: the connection ends here."""


def untouched(data: bytes) -> bytes:
    return data


class Relay:
    """Listens at `address` and carries each connection on to `target`.

        with Relay("127.0.0.1:7001", lambda number: (untouched, flip)) as relay:
            connect_to(relay.address)

    `tampers` is asked once for each connection, numbered from 0, for what is to be done on the way to the target and on the way back.
    Owner: the `with` block, which ends all connections and threads.
    """

    def __init__(self, target: str, tampers: Callable[[int], tuple[Tamper, Tamper]]) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._tampers = tampers
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def _start(self, task: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=task, name="relay", daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        for number in itertools.count():
            try:
                caller, _ = self._listener.accept()
                called = socket.create_connection(self._target)
            except OSError:  # closed
                return
            self._sockets += [caller, called]
            there, back = self._tampers(number)
            self._start(lambda a=caller, b=called, t=there: _carry(a, b, t))  # type: ignore[misc]
            self._start(lambda a=called, b=caller, t=back: _carry(a, b, t))  # type: ignore[misc]

    def __exit__(self, *exc_info: object) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in self._sockets:
            sock.close()


def _carry(source: socket.socket, target: socket.socket, tamper: Tamper) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK_BYTES):
            changed = tamper(data)
            if changed is None:
                break
            target.sendall(changed)
    for sock in (source, target):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def flip_at(position: int, bit: int = 0) -> Tamper:
    """One bit of the byte at `position` of the stream."""
    seen = 0

    def tamper(data: bytes) -> bytes:
        nonlocal seen
        place, seen = position - seen, seen + len(data)
        if not 0 <= place < len(data):
            return data
        return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]

    return tamper


def cut_at(position: int) -> Tamper:
    """The connection ends after so many bytes."""
    seen = 0

    def tamper(data: bytes) -> bytes | None:
        nonlocal seen
        seen += len(data)
        return data if seen <= position else None

    return tamper


def swap_at(start: int, width: int) -> Tamper:
    """Two neighbouring runs of `width` bytes, from `start`, in each other's place; held back until both are there."""
    sent = 0
    held = b""

    def tamper(data: bytes) -> bytes:
        nonlocal sent, held
        held += data
        if sent > start or sent + len(held) <= start:
            ready, held = held, b""
        elif sent + len(held) < start + 2 * width:
            ready, held = held[: start - sent], held[start - sent :]
        else:
            first, middle, last = start - sent, start - sent + width, start - sent + 2 * width
            ready, held = held[:first] + held[middle:last] + held[first:middle] + held[last:], b""
        sent += len(ready)
        return ready

    return tamper


class Recorder:
    """Lets everything pass, and remembers it."""

    def __init__(self) -> None:
        self.data = b""

    def __call__(self, data: bytes) -> bytes:
        self.data += data
        return data
