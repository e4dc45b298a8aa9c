"""Hands the file descriptor of a block pool from its owner to readers, over a Unix socket in the private run folder.

The owner greets each connection with the pool's id, the descriptor riding along (SCM_RIGHTS), and closes it. Only processes of the
same user are served.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from pathlib import Path

from polyphase.core.errors import ConfigurationError, TransferError
from polyphase.runtime.paths import MAX_SOCKET_PATH_BYTES
from polyphase.transfer.opened import OpenedPool
from polyphase.wire.kv import PoolDescriptor

log = logging.getLogger(__name__)

GREETING = b"POOL"


class PoolServer:
    """Serves one descriptor at one path until closed."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._path: Path | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, socket_path: str, fd: int) -> None:
        """Begin to serve `fd`, which stays the caller's and must outlive the server. A socket left by a dead process is replaced.

        Raises: ConfigurationError if the path is too long or cannot be bound.
        """
        listener = _bind(Path(socket_path))
        listener.setblocking(False)
        self._socket, self._path = listener, Path(socket_path)
        self._task = asyncio.create_task(self._serve(listener, fd), name="pool-server")

    async def _serve(self, listener: socket.socket, fd: int) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # out of descriptors, most likely: others are tried later
                log.warning("a reader of the block pool could not be accepted: %s", error)
                await asyncio.sleep(0.1)
                continue
            with connection:
                try:
                    if _peer_uid(connection) in (None, os.getuid()):
                        socket.send_fds(connection, [GREETING], [fd])  # a fresh socket has room: this does not block
                    else:
                        log.warning("a process of another user asked for the block pool and was refused")
                except OSError as error:
                    log.warning("the block pool could not be handed over: %s", error)

    async def close(self) -> None:
        """Stop serving and remove the socket. Pools that were handed over stay readable. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None


def _bind(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise ConfigurationError(f"the socket path '{path}' has more than {MAX_SOCKET_PATH_BYTES} bytes; choose a shorter run folder")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"the block pool cannot be served at {path}: {error.strerror}") from error
    return listener


async def open_pool(descriptor: PoolDescriptor, timeout_s: float) -> OpenedPool:
    """Fetch the descriptor of a pool from its owner and map it.

    Raises: TransferError if the owner is gone, does not answer in time, or hands over something else.
    Cancel: nothing stays open.
    """
    path = descriptor.socket_path
    try:
        async with asyncio.timeout(timeout_s):
            fd = await _fetch_descriptor(path)
    except TimeoutError:
        raise TransferError(f"the owner of block pool {descriptor.pool_id} did not hand it over at {path} within {timeout_s} s") from None
    except OSError as error:
        raise TransferError(f"the owner of block pool {descriptor.pool_id} cannot be reached at {path}: {error}") from error
    try:
        return OpenedPool.from_fd(fd, descriptor)
    finally:
        os.close(fd)


async def _fetch_descriptor(path: str) -> int:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        await loop.sock_connect(connection, path)
        readable = asyncio.Event()
        loop.add_reader(connection.fileno(), readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(connection.fileno())
        greeting, fds, _flags, _address = socket.recv_fds(connection, len(GREETING), 1)
    if greeting != GREETING or len(fds) != 1:
        for fd in fds:
            os.close(fd)
        raise TransferError(f"whoever listens at {path} does not hand over a block pool")
    os.set_inheritable(fds[0], False)
    return fds[0]


def _peer_uid(connection: socket.socket) -> int | None:
    """User id of the process at the other end; `None` where the system does not tell (the folder's permissions then have to do)."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    width = struct.calcsize("iII")
    _pid, uid, _gid = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, width))
    return int(uid)
