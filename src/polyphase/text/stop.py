"""Finds stop strings in a text that arrives in pieces, and holds back only what may still become one."""

from __future__ import annotations

from collections.abc import Sequence


class StopStringMatcher:
    """The match that is complete first wins; of those complete at the same character, the longest.

    So the result does not depend on how the text was cut into pieces: the engine, which looks at each token, and a frontend, which gets
    several at once, stop at the same place. With `include_stop` the stop string itself is part of the text.

    Cost: one search for each stop string in the new text and the held-back part (shorter than the longest stop string).
    """

    def __init__(self, stop_strings: Sequence[str], include_stop: bool = False) -> None:
        if any(not stop for stop in stop_strings):
            raise ValueError("a stop string cannot be empty: it would match everywhere")
        self._stops = tuple(stop_strings)
        self._include_stop = include_stop
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        return self._matched

    def push(self, text: str) -> tuple[str, str | None]:
        """Returns: text that may be shown, and the stop string that matched, if one has. After a match nothing more is shown."""
        if self._matched is not None:
            return "", self._matched
        if not self._stops:
            return text, None
        text = self._held + text
        best = min(((text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text), default=None)
        if best is not None:
            end, negative_length, self._matched = best
            self._held = ""
            return text[: end if self._include_stop else end + negative_length], self._matched
        begin = min(_open_match(text, stop) for stop in self._stops)
        self._held = text[begin:]
        return text[:begin], None

    def flush(self) -> str:
        """What was held back, at the end of the sequence."""
        held, self._held = self._held, ""
        return held


def _open_match(text: str, stop: str) -> int:
    """Where in `text`, which does not contain `stop`, a match of it may have begun; `len(text)` if nowhere."""
    begin = max(0, len(text) - len(stop) + 1)
    while (begin := text.find(stop[0], begin)) != -1:
        if stop.startswith(text[begin:]):
            return begin
        begin += 1
    return len(text)
