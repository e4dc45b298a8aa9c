"""How long to wait before a process that ended is started again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BackoffRule:
    first_s: float = 1.0
    max_s: float = 30.0
    healthy_s: float = 60.0  # a life this long wipes out what was before


class Backoff:
    """Doubles from one short life to the next."""

    def __init__(self, rule: BackoffRule) -> None:
        self._rule = rule
        self._next_s = rule.first_s

    def after_life_of(self, lived_s: float) -> float:
        """Seconds to wait now that the process has ended after `lived_s`."""
        if lived_s >= self._rule.healthy_s:
            self._next_s = self._rule.first_s
        delay_s = self._next_s
        self._next_s = min(2 * delay_s, self._rule.max_s)
        return delay_s
