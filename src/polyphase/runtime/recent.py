"""The batches that a worker published last, as they went over the wire, for listeners that missed some of them."""

from __future__ import annotations

from collections import deque
from itertools import islice

MAX_KEPT_BATCHES = 4096
MAX_KEPT_BYTES = 8 << 20  # about 900,000 blocks
MAX_ANSWER_BYTES = 1 << 20  # then the listener asks on, and others have a turn


class RecentBatches:
    """Batches are numbered from 1 without a gap. Beyond the bounds the oldest go, but for the last one."""

    def __init__(self, max_batches: int = MAX_KEPT_BATCHES, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._max_batches = max_batches
        self._max_bytes = max_bytes
        self._kept: deque[bytes] = deque()
        self._byte_count = 0
        self._last = 0  # sequence number

    def add(self, sequence: int, data: bytes) -> None:
        assert sequence == self._last + 1, f"batch {sequence} after batch {self._last}"
        self._last = sequence
        self._kept.append(data)
        self._byte_count += len(data)
        while len(self._kept) > self._max_batches or (self._byte_count > self._max_bytes and len(self._kept) > 1):
            self._byte_count -= len(self._kept.popleft())

    def after(self, sequence: int) -> list[bytes]:
        """The next ones behind this number, at least one if there are any; none if the first of them is no longer kept."""
        oldest = self._last - len(self._kept) + 1
        if not oldest <= sequence + 1 <= self._last:
            return []
        found: list[bytes] = []
        room = MAX_ANSWER_BYTES
        for data in islice(self._kept, sequence + 1 - oldest, None):
            room -= len(data)
            if found and room < 0:
                break
            found.append(data)
        return found
