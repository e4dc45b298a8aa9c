"""From scores to one worker."""

from __future__ import annotations

from collections.abc import Sequence

from polyphase.router.lineup import Lineup


class HighestScore:
    """The best score; equal ones take turns, so that no worker is favoured for its name or its place in a list."""

    def pick(self, scores: Sequence[float], workers: Lineup, turn: int) -> int:
        best = max(scores)
        first = scores.index(best)
        if scores.count(best) == 1:
            return first
        tied = [position for position, score in enumerate(scores) if score == best]
        return tied[turn % len(tied)]
