"""Tells when something in a folder changed: by inotify where the system has it, by looking again and again elsewhere."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or sys.platform == "linux":
    import asyncinotify

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.25
SETTLING_S = (0.005, 0.05, 0.5)  # after a change, when to look again: the kernel tells of a close before it drops the file's lock


async def folder_changes(folder: Path, check_interval_s: float) -> AsyncGenerator[None, None]:
    """Yields at once, then after every change, and at the latest `check_interval_s` after the last time.

    A change is: a file goes, is moved into place, or a process that had it open for writing closes it, be it by dying. Each change is
    told more than once, so that what follows from it a moment later is seen too. The watch stands before the first yield, so that
    nothing is missed in between.
    """
    inotify = open_inotify()
    if inotify is None:
        yield
        while True:
            await asyncio.sleep(min(POLL_INTERVAL_S, check_interval_s))
            yield
    with inotify:
        mask = asyncinotify.Mask
        inotify.add_watch(folder, mask.CLOSE_WRITE | mask.MOVED_TO | mask.DELETE | mask.ONLYDIR)
        yield
        waits_s: list[float] = []
        while True:
            try:
                async with asyncio.timeout(waits_s.pop(0) if waits_s else check_interval_s):
                    await inotify.get()
                waits_s = list(SETTLING_S)
            except TimeoutError:
                pass
            yield


def open_inotify() -> asyncinotify.Inotify | None:
    """`None` where there is no inotify, or none is left for this user."""
    if sys.platform != "linux":
        return None
    try:
        return asyncinotify.Inotify()
    except OSError as error:
        log.warning("inotify is not to be had (%s): the registry is looked at every %s s instead", error, POLL_INTERVAL_S)
        return None
