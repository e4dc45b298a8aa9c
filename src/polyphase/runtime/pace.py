"""How often a listener may ask one worker for everything it holds: at once the first time, then less and less often.

A snapshot mends what was lost, but a stream that breaks again right away is not mended by more of them: they would only load a worker
that is perhaps behind already. After a calm minute the next one is again free.
"""

from __future__ import annotations

FIRST_DELAY_NS = 250_000_000
MAX_DELAY_NS = 16 * 10**9
CALM_NS = 60 * 10**9


class SnapshotPace:
    def __init__(self) -> None:
        self._delay_ns = 0
        self._free_from_ns: int | None = None  # None: there was none yet

    def try_begin(self, now_ns: int) -> bool:
        """Whether a snapshot may be asked for now; True counts as asking."""
        if self._free_from_ns is not None and now_ns < self._free_from_ns:
            return False
        is_calm = self._free_from_ns is None or now_ns >= self._free_from_ns + CALM_NS
        self._delay_ns = FIRST_DELAY_NS if is_calm else min(2 * self._delay_ns, MAX_DELAY_NS)
        self._free_from_ns = now_ns + self._delay_ns
        return True
