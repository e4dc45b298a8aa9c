"""Breaks living connections between processes of one machine, as a switched-off router or a full table of a firewall would.

A copy of the other process's socket is taken (`pidfd_getfd`, Linux 5.6 and later, allowed for whoever may trace it) and shut down; both
ends then see the connection closed, with whatever was on its way lost. The processes live on.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
from pathlib import Path

from polyphase.core.errors import PolyphaseError

_SYS_PIDFD_GETFD = 438  # Source: the same number on all architectures since Linux 5.6
_CONNECTED = "03"
_SOCKET_LINK = re.compile(r"socket:\[(\d+)\]")


class CannotCut(PolyphaseError):
    """This system does not let one process touch another's sockets."""

    code = "cannot_cut"
    stage = "testing"


def cut_connections(pid: int, socket_path: Path) -> int:
    """Shut down every accepted connection of the Unix socket at `socket_path` that process `pid` holds. Returns: how many.

    Raises: CannotCut; ProcessLookupError if there is no such process.
    """
    inodes = _connected_inodes(str(socket_path))
    count = 0
    for fd in _socket_fds(pid, inodes):
        copied = _copy_fd(pid, fd)
        if copied is None:
            continue
        with socket.socket(fileno=copied) as copy:
            try:
                copy.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it closed this moment
            count += 1
    return count


def _connected_inodes(path: str) -> set[str]:
    """The accepting side's sockets carry the path that they were accepted at."""
    found = set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) == 8 and fields[5] == _CONNECTED and fields[7] == path:
            found.add(fields[6])
    return found


def _socket_fds(pid: int, inodes: set[str]) -> list[int]:
    found = []
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except FileNotFoundError:
        raise ProcessLookupError(f"there is no process {pid}") from None
    for name in names:
        try:
            link = _SOCKET_LINK.fullmatch(os.readlink(f"/proc/{pid}/fd/{name}"))
        except OSError:
            continue
        if link is not None and link[1] in inodes:
            found.append(int(name))
    return found


def _copy_fd(pid: int, fd: int) -> int | None:
    """None: it closed this moment. Raises: CannotCut; ProcessLookupError if the process ended meanwhile."""
    if pid == os.getpid():
        return os.dup(fd)
    pidfd = os.pidfd_open(pid)
    try:
        copy = int(ctypes.CDLL(None, use_errno=True).syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0))
    finally:
        os.close(pidfd)
    if copy >= 0:
        return copy
    match ctypes.get_errno():
        case errno.EBADF:
            return None
        case errno.ESRCH:
            raise ProcessLookupError(f"process {pid} has ended")
        case error:
            raise CannotCut(f"the connections of process {pid} cannot be reached: {os.strerror(error)}")
