"""Virtual time: a clock, and a heap of what is to happen when. What is due at the same instant happens in the order of asking."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

Action = Callable[[], None]


class Timeline:
    """A `core.clock.Clock`."""

    def __init__(self) -> None:
        self._now_ns = 0
        self._heap: list[tuple[int, int, Action]] = []
        self._order = count()

    def now_ns(self) -> int:
        return self._now_ns

    def at(self, time_ns: int, action: Action) -> None:
        """Times that are over count as now."""
        heapq.heappush(self._heap, (max(time_ns, self._now_ns), next(self._order), action))

    def after(self, delay_ns: int, action: Action) -> None:
        self.at(self._now_ns + delay_ns, action)

    def step(self) -> bool:
        """Let the next thing happen. False if nothing is left."""
        if not self._heap:
            return False
        self._now_ns, _, action = heapq.heappop(self._heap)
        action()
        return True
