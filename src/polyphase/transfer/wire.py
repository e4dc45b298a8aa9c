"""A connection between two agents, used by one thread at a time: frames, descriptors that ride along, and long runs of bytes.

Every call ends by the connection's deadline, for which the kernel is given the time that is left: one system call for a whole chunk, where
a socket that Python watches over needs two for each part of it. A wire on which a call failed has lost its place and is closed.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
from collections.abc import Iterator
from typing import Protocol, TypeVar

from polyphase.core.clock import Clock
from polyphase.core.errors import (
    ForeignDescriptor,
    PeerLost,
    PolyphaseError,
    StaleDescriptor,
    TransferError,
    TransferRefused,
    TransferTimeout,
    WireError,
)
from polyphase.wire.transfer import Frame, Refusal, decode_frame, encode_frame, frame_length

MAX_BUFFERS = 256  # in one call; the kernel takes 1024
_TIME = struct.Struct("@ll")  # struct timeval
_INT_BYTES = struct.calcsize("i")
_REFUSALS: dict[str, type[TransferError]] = {
    kind.code: kind for kind in (TransferError, TransferRefused, PeerLost, TransferTimeout, StaleDescriptor, ForeignDescriptor)
}

F = TypeVar("F")


class Closeable(Protocol):
    def close(self) -> None: ...


class Wire:
    """Owner: whoever holds it closes it. `deadline_ns` is set before a conversation and holds for each of its calls."""

    def __init__(self, sock: socket.socket, clock: Clock, peer: str) -> None:
        sock.settimeout(None)
        self.socket = sock
        self.peer = peer  # for messages
        self.deadline_ns = 0
        self.clock = clock
        self._is_unix = sock.family == socket.AF_UNIX
        self._fds: list[int] = []
        self.is_closed = False
        self.kept: dict[str, Closeable] = {}  # by whoever serves this connection; closed with it

    def send(self, frame: Frame, fds: tuple[int, ...] = ()) -> None:
        """Raises: PeerLost, TransferTimeout."""
        data = encode_frame(frame)
        if fds:
            with self.failing_well():
                self._arm(socket.SO_SNDTIMEO)
                sent = socket.send_fds(self.socket, [data], list(fds))
            data = data[sent:]
            if not data:
                return
        self.send_buffers([memoryview(data)])

    def receive(self) -> Frame:
        """Raises: PeerLost, TransferTimeout, WireError."""
        header = bytearray(4)
        self._fill(memoryview(header))
        body = bytearray(frame_length(bytes(header)))
        self._fill(memoryview(body))
        return decode_frame(body)

    def has_arrived(self) -> bool:
        """Whether something can be read without waiting, be it the end of the connection."""
        poll = select.poll()
        with self.failing_well():
            poll.register(self.socket, select.POLLIN)
            return bool(poll.poll(0))

    def take_fd(self) -> int:
        """The descriptor that came with what was received last. Owner: the caller. Raises: WireError if none came."""
        if not self._fds:
            raise WireError(f"{self.peer} did not hand over the descriptor that it announced")
        return self._fds.pop(0)

    def send_buffers(self, buffers: list[memoryview]) -> None:
        """All bytes of all buffers, from where they lie. Raises: as `send`."""
        with self.failing_well():
            start = 0
            while start < len(buffers):
                batch = buffers[start : start + MAX_BUFFERS]
                start += len(batch)
                self._send_batch(batch)

    def _send_batch(self, batch: list[memoryview]) -> None:
        while batch:
            self._arm(socket.SO_SNDTIMEO)
            sent = self.socket.sendmsg(batch)
            batch = _rest(batch, sent)

    def receive_buffers(self, buffers: list[memoryview]) -> None:
        """Fill all buffers, in order. Raises: as `receive`."""
        with self.failing_well():
            start = 0
            while start < len(buffers):
                batch = buffers[start : start + MAX_BUFFERS]
                start += len(batch)
                while batch:
                    self._arm(socket.SO_RCVTIMEO)
                    received, _, _, _ = self.socket.recvmsg_into(batch, 0, socket.MSG_WAITALL)
                    if received == 0:
                        raise PeerLost(f"{self.peer} closed the connection")
                    batch = _rest(batch, received)

    def _fill(self, view: memoryview) -> None:
        with self.failing_well():
            while view:
                self._arm(socket.SO_RCVTIMEO)
                received = self._receive_into(view)
                if received == 0:
                    raise PeerLost(f"{self.peer} closed the connection")
                view = view[received:]

    def _receive_into(self, view: memoryview) -> int:
        if not self._is_unix:
            return self.socket.recv_into(view, 0, socket.MSG_WAITALL)
        received, ancillary, _, _ = self.socket.recvmsg_into([view], socket.CMSG_SPACE(4 * _INT_BYTES))
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) // _INT_BYTES * _INT_BYTES])
                for fd in fds:
                    os.set_inheritable(fd, False)
                self._fds.extend(fds)
        return received

    def _arm(self, option: int) -> None:
        """Before each system call: what is left of the time. `option`: SO_RCVTIMEO or SO_SNDTIMEO."""
        left_us = (self.deadline_ns - self.clock.now_ns()) // 1000
        if left_us <= 0:
            raise TimeoutError
        self.socket.setsockopt(socket.SOL_SOCKET, option, _TIME.pack(*divmod(left_us, 1_000_000)))

    @contextlib.contextmanager
    def failing_well(self) -> Iterator[None]:
        """What a call on the socket raises becomes what this class says, and closes the wire."""
        try:
            yield
        except (TimeoutError, BlockingIOError):
            self.close()
            raise TransferTimeout(f"{self.peer} did not answer in time") from None
        except (OSError, ValueError) as error:  # ValueError: closed by another thread
            self.close()
            raise PeerLost(f"the connection to {self.peer} broke: {error}") from error
        except (PeerLost, TransferTimeout, WireError):
            self.close()
            raise

    def break_off(self) -> None:
        """Make the call that another thread is in end at once."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Idempotent."""
        self.is_closed = True
        self.socket.close()
        while self.kept:
            self.kept.popitem()[1].close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


def _rest(buffers: list[memoryview], done_bytes: int) -> list[memoryview]:
    """What is left of the buffers when `done_bytes` of them are through."""
    for number, buffer in enumerate(buffers):
        if done_bytes < buffer.nbytes:
            return [buffer[done_bytes:], *buffers[number + 1 :]]
        done_bytes -= buffer.nbytes
    return []


def expect(frame: Frame, kind: type[F]) -> F:
    """Raises: WireError if another kind of frame came; what a `Refusal` says, as the error that it names."""
    if isinstance(frame, kind):
        return frame
    if isinstance(frame, Refusal):
        raise _REFUSALS.get(frame.code, TransferRefused)(frame.reason)
    raise WireError(f"a {kind.__name__} frame was expected, a {type(frame).__name__} came")


def refusal_of(error: PolyphaseError) -> Refusal:
    return Refusal(error.code, error.message)
