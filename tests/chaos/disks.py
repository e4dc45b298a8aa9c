"""Disks that are full for a while."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import subprocess
from pathlib import Path

DISK_BYTES = 64 << 20


def mount_small_disk(folder: Path) -> bool:
    """A disk of its own for the deployment, small enough to be filled; needs root. Returns: whether there is one."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


async def hold_filler(filler: Path, seconds: float) -> None:
    """A file that takes all that is left of its disk."""
    try:
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):  # noqa: ASYNC230  it is soon full
            while True:
                file.write(bytes(1 << 16))
        await asyncio.sleep(seconds)
    finally:
        os.unlink(filler)


async def hold_limit(pid: int, seconds: float) -> None:
    """A process that may write to no file."""
    hard = resource.RLIM_INFINITY
    try:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
        await asyncio.sleep(seconds)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
