"""Notices that processes of this machine are dying, before the kernel has let go of what they held.

A killed process keeps its connections and locks until its memory is freed: 65 to 285 ms for a worker with 1 GB on an idle machine, and
up to seconds where cores are busy. That SIGKILL waits for it shows at once in `/proc/PID/status`, and a moment later that it has no memory.

The file is opened once for each life and read again and again, 5 µs a time, so that no other process of this number can be taken for it.
Where there is no such file (another system, another host, another container), nothing is noticed here, and the registry tells later.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

LOOK_INTERVAL_S = 0.01
IDLE_INTERVAL_S = 0.25  # while nobody would be the worse for it

_KILLED = 1 << (signal.SIGKILL - 1)
_PENDING = re.compile(rb"\n(?:SigPnd|ShdPnd):\t([0-9a-f]+)")  # Source: proc_pid_status(5): masks of waiting signals, hexadecimal


def start_ticks(pid: int) -> int:
    """When a process began, in clock ticks since boot: tells it from others of the same number. 0 if that cannot be read.

    Source: proc_pid_stat(5), field 22; the name before it is in brackets and may hold anything.
    """
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


class DeathWatch:
    """Used on one event loop. Owner of the files that it reads: `close`."""

    def __init__(self, on_death: Callable[[str], None], is_busy: Callable[[], bool]) -> None:
        """`on_death` is called once for each, by the name under which it is watched. `is_busy`: whether to look often."""
        self._on_death = on_death
        self._is_busy = is_busy
        self._files: dict[str, int] = {}

    def watch(self, name: str, pid: int, began_ticks: int) -> bool:
        """Returns: whether this process can be watched from here. One watched under this name before is forgotten."""
        self.forget(name)
        try:
            fd = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        if not began_ticks or start_ticks(pid) != began_ticks:  # looked at after opening: the file is of one life
            os.close(fd)
            return False
        self._files[name] = fd
        return True

    def forget(self, name: str) -> None:
        """Unknown names are ignored."""
        fd = self._files.pop(name, None)
        if fd is not None:
            os.close(fd)

    def look(self) -> None:
        """Report who is dying, and forget them. Cost: 5 µs each."""
        dying = [name for name, fd in self._files.items() if _is_dying(fd)]
        for name in dying:
            self.forget(name)
            self._on_death(name)

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_INTERVAL_S if self._is_busy() else IDLE_INTERVAL_S)

    def close(self) -> None:
        for name in list(self._files):
            self.forget(name)


def _is_dying(fd: int) -> bool:
    try:
        status = os.pread(fd, 4096, 0)
    except ProcessLookupError:  # it is gone altogether
        return True
    return b"\nVmSize:" not in status or any(int(mask, 16) & _KILLED for mask in _PENDING.findall(status))
