"""How much memory this process may still take, and anonymous memory that another process can be given: for the block pool."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

PREFAULT_CHUNK_BYTES = 128 << 20
F_SEAL_FUTURE_WRITE = 0x0010  # Source: linux/fcntl.h (5.1); Python 3.11 has no name for it


def available_memory_bytes() -> int | None:
    """What can be taken without swapping: the least of the kernel's estimate and the room left in this process's cgroup.

    Returns: `None` where the system does not say.
    """
    limits = [limit for limit in (_meminfo_available_bytes(), _cgroup_room_bytes(Path("/sys/fs/cgroup"))) if limit is not None]
    return min(limits, default=None)


def _meminfo_available_bytes() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _cgroup_room_bytes(folder: Path) -> int | None:
    """Room below cgroup v2's `memory.max`; file pages that the kernel would drop do not count as used."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((folder / "memory.current").read_text())
        inactive = [line.split()[1] for line in (folder / "memory.stat").read_text().splitlines() if line.startswith("inactive_file ")]
        return max(0, int(limit) - used + int(inactive[0] if inactive else 0))
    except (OSError, ValueError):
        return None


def create_anonymous_file(name: str, byte_count: int) -> int:
    """A file of `byte_count` zero bytes without a name that could outlive its users: a memfd, or an unlinked temporary file.

    Owner: the caller closes the returned descriptor.
    """
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        os.ftruncate(fd, byte_count)
    except BaseException:
        os.close(fd)
        raise
    return fd


def allocate_pages(fd: int, byte_count: int, on_progress: Callable[[int, int], None] | None) -> None:
    """Give the file real pages now: a first touch runs at about 1 GB/s, and a full machine must be found out at start-up.

    Args:
        on_progress: called with (bytes done, bytes in all) after each chunk.

    Raises: OSError if the memory is not there.
    """
    for start in range(0, byte_count, PREFAULT_CHUNK_BYTES):
        length = min(PREFAULT_CHUNK_BYTES, byte_count - start)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, start, length)
        if on_progress is not None:
            on_progress(start + length, byte_count)


def seal(fd: int) -> None:
    """Forbid every later change of size and every later writable mapping; mappings that exist stay writable.

    A file that cannot be sealed (a temporary file) is left as it is.
    """
    if not hasattr(fcntl, "F_ADD_SEALS"):
        return
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)


def can_shrink(fd: int) -> bool:
    """Whether a memfd may still be cut short, which would kill whoever reads the lost pages; false for files that cannot be asked."""
    if not hasattr(fcntl, "F_GET_SEALS"):
        return False
    try:
        return not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    except OSError:
        return False
