"""Where time comes from. Deciding code is given the time; only the code around it holds a clock."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A clock that never goes backwards. Two processes on one host that use `MonotonicClock` read the same time."""

    def now_ns(self) -> int: ...


class MonotonicClock:
    """The operating system's CLOCK_MONOTONIC, in nanoseconds."""

    def now_ns(self) -> int:
        return time.monotonic_ns()


class ManualClock:
    """Stands still until told to move; for tests and simulation."""

    def __init__(self, start_ns: int = 0) -> None:
        self._now_ns = start_ns

    def now_ns(self) -> int:
        return self._now_ns

    def advance(self, delta_ns: int) -> None:
        if delta_ns < 0:
            raise ValueError(f"a clock cannot go back: delta_ns={delta_ns}")
        self._now_ns += delta_ns
