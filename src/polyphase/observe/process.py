"""What this process costs: its memory and its age."""

from __future__ import annotations

import os
import resource
import sys
import time

_started_ns = time.monotonic_ns()


def rss_bytes() -> int:
    """Resident memory now; where the system tells only the peak, the peak. Shared pages that were touched count."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def uptime_s() -> float:
    """Seconds since this module was imported, which processes do first."""
    return (time.monotonic_ns() - _started_ns) / 1e9
