"""Where each session was last: a session is whatever a client says belongs together, usually the turns of one conversation.

    route ─► noted: decode worker, worker of the prompt ─► idle for `idle_ns`, or one of the oldest of too many ─► forgotten

Only a preference, see `scorers.Session`: the prefix index knows better what is cached where, as soon as it knows anything.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from polyphase.core.ids import Epoch, WorkerId
from polyphase.router.types import PREFILL, Leg, SessionRule

Home = tuple[WorkerId, Epoch]


@dataclass(frozen=True, slots=True)
class _Seen:
    decode: Home
    prompt: Home
    at_ns: int


class Sessions:
    """By model and session, least recently used first. Time is handed in; one before the last known counts as that."""

    def __init__(self, rule: SessionRule) -> None:
        self._rule = rule
        self._seen: OrderedDict[tuple[str, int], _Seen] = OrderedDict()
        self._now_ns = 0

    def __len__(self) -> int:
        return len(self._seen)

    def home(self, model: str, session: int, leg: Leg, now_ns: int) -> Home | None:
        """The worker, in that life of it, that had this leg of the session's latest request; None if unknown or idle for too long."""
        self._expire(now_ns)
        seen = self._seen.get((model, session))
        if seen is None:
            return None
        return seen.prompt if leg is PREFILL else seen.decode

    def note(self, model: str, session: int, decode: Home, prompt: Home, now_ns: int) -> None:
        """A request of this session was routed there."""
        self._expire(now_ns)
        key = (model, session)
        self._seen[key] = _Seen(decode, prompt, self._now_ns)
        self._seen.move_to_end(key)
        if len(self._seen) > self._rule.capacity:
            self._seen.popitem(last=False)

    def _expire(self, now_ns: int) -> None:
        self._now_ns = max(self._now_ns, now_ns)
        while self._seen:
            key, oldest = next(iter(self._seen.items()))
            if self._now_ns - oldest.at_ns < self._rule.idle_ns:
                return
            del self._seen[key]
