"""Ends a process when the one that started it has gone, so that a killed supervisor leaves nothing running."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # Source: linux/prctl.h


class Lifeline:
    """Holds on to the parent process. Where the kernel can, it sends SIGTERM the moment the parent ends; elsewhere ask `is_cut`."""

    def __init__(self) -> None:
        """To be made as early as possible: a parent that ended before goes unnoticed if another process took its place before."""
        self._parent = os.getppid()
        if sys.platform == "linux":
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
                log.warning("the kernel will not tell when process %d ends: %s", self._parent, os.strerror(ctypes.get_errno()))

    def is_cut(self) -> bool:
        """Whether the parent has ended; also true if it did so before the kernel was asked to tell."""
        return os.getppid() != self._parent
