"""Whether a server can be given anything now, by what requests and probes met there.

    open ── connection refused, or `FAILURES` answers of 5xx in a row ──► closed: an outage, which frontends are told
         ── 429 or 503 with Retry-After ────────────────────────────────► closed for that time: it is only full
    closed ── a probe that succeeds, not before a time that doubles with each outage ──► open

Values in, verdicts out; times are the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass

from polyphase.core.errors import Overloaded

FAILURES = 3
FIRST_BACKOFF_S, MAX_BACKOFF_S = 1.0, 30.0
MAX_WAIT_S = 300.0  # whatever a server asks for


@dataclass(slots=True)
class Gate:
    outage: str = ""  # why it is closed; empty: it is not
    _opens_s: float = 0.0  # not before
    _backoff_s: float = FIRST_BACKOFF_S
    _failures: int = 0
    _full_until_s: float = 0.0

    @property
    def has_outage(self) -> bool:
        return bool(self.outage)

    def note_success(self) -> None:
        """A request was answered."""
        self._failures = 0
        self._backoff_s = FIRST_BACKOFF_S

    def note_failure(self, reason: str, now_s: float) -> None:
        """An answer of 5xx, or none."""
        self._failures += 1
        if self._failures >= FAILURES:
            self.close(reason, now_s)

    def close(self, reason: str, now_s: float) -> None:
        """It cannot be reached. While it is closed, only the reason changes."""
        if not self.outage:
            self._opens_s = now_s + self._backoff_s
            self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)
        self.outage = reason

    def note_full(self, wait_s: float, now_s: float) -> None:
        self._full_until_s = max(self._full_until_s, now_s + min(max(wait_s, 0.0), MAX_WAIT_S))

    def note_probe(self, now_s: float) -> bool:
        """A probe succeeded. Returns: whether that opens the gate."""
        if not self.outage or now_s < self._opens_s:
            return False
        self.outage = ""
        self._failures = FAILURES - 1  # one more failure closes it again
        return True

    def refuse_if_closed(self, now_s: float) -> None:
        """Raises: Overloaded."""
        if self.outage:
            raise Overloaded(self.outage)
        if now_s < self._full_until_s:
            left_s = self._full_until_s - now_s
            raise Overloaded(f"the server asked for no requests for another {left_s:.0f} s", retry_after_s=max(1, round(left_s)))


def retry_after_s(header: str | None) -> float:
    """Of a header that gives seconds; a date, or none, is one second. Source: RFC 9110, 10.2.3."""
    try:
        return max(float(header), 0.0) if header is not None else 1.0
    except ValueError:
        return 1.0
