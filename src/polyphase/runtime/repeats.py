"""Words that may be said twice, kept for a while: a connection that breaks may have swallowed them, and then they are said again.

Releases and cancels are such: what they name may have ended long ago, and that is no error.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from polyphase.core.clock import Clock, MonotonicClock
from polyphase.wire.requests import Cancel, ReleaseLease

KEPT_S = 30.0  # as long as a lease lasts that nobody gives back
MAX_KEPT = 1024  # over all workers; then the oldest go

Repeatable = Cancel | ReleaseLease


class _Said(NamedTuple):
    worker_id: str
    message: Repeatable
    at_ns: int


class Repeats:
    """Of one peer, by worker."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or MonotonicClock()
        self._said: deque[_Said] = deque(maxlen=MAX_KEPT)

    def note(self, worker_id: str, message: Repeatable) -> None:
        """It was sent just now."""
        self._said.append(_Said(worker_id, message, self._clock.now_ns()))

    def of(self, worker_id: str) -> list[Repeatable]:
        """What this worker may not have got, the oldest first."""
        oldest_ns = self._clock.now_ns() - int(KEPT_S * 1e9)
        while self._said and self._said[0].at_ns < oldest_ns:
            self._said.popleft()
        return [said.message for said in self._said if said.worker_id == worker_id]
