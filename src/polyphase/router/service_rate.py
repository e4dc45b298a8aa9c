"""How fast a queue is worked off: tokens per second over the last seconds in which something waited.

Only time in which something waits counts, so a quiet night says nothing of what the fleet can do, and what was learned before it is kept.
"""

from __future__ import annotations

import math

MEMORY_S = 10.0  # of waiting time: what lies twice as far back counts e times less
LEAST_S = 0.5  # before so much was seen, nothing is said


class ServiceRate:
    def __init__(self) -> None:
        self._tokens = 0.0  # both fade alike
        self._seconds = 0.0
        self._since_ns: int | None = None  # seen until here; None while nothing waits

    def start(self, now_ns: int) -> None:
        """Something waits from now on. Again: nothing changes."""
        if self._since_ns is None:
            self._since_ns = now_ns

    def stop(self, now_ns: int) -> None:
        """Nothing waits any more."""
        self._advance(now_ns)
        self._since_ns = None

    def note(self, tokens: int, now_ns: int) -> None:
        """So much work has left the queue."""
        self._advance(now_ns)
        self._tokens += tokens

    def tokens_per_s(self, next_tokens: int, now_ns: int) -> float | None:
        """None while too little is known. A standstill makes it fall. But `next_tokens` count as if they went now."""
        self._advance(now_ns)
        return max(self._tokens, next_tokens) / self._seconds if self._seconds >= LEAST_S else None

    def _advance(self, now_ns: int) -> None:
        if self._since_ns is None:
            return
        seconds = (now_ns - self._since_ns) / 1e9
        fading = math.exp(-seconds / MEMORY_S)
        self._tokens *= fading
        self._seconds = self._seconds * fading + MEMORY_S * (1 - fading)  # the integral of what fades
        self._since_ns = now_ns
