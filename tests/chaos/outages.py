"""When which frontend was not there, because the chaos killed it: only then may a client's connection break."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass
class _Outage:
    url: str
    began_s: float
    ended_s: float = float("inf")


class Outages:
    """Times are of the monotonic clock."""

    def __init__(self) -> None:
        self._all: list[_Outage] = []

    def begin(self, url: str) -> None:
        self._all.append(_Outage(url, time.monotonic()))

    def end(self, url: str) -> None:
        for outage in self._all:
            if outage.url == url:
                outage.ended_s = min(outage.ended_s, time.monotonic())

    def is_out(self, url: str) -> bool:
        return any(outage.url == url and outage.ended_s == float("inf") for outage in self._all)

    def touch(self, url: str, since_s: float) -> bool:
        """Whether this frontend was away at any time from `since_s` until now."""
        return any(outage.url == url and outage.ended_s >= since_s for outage in self._all)
