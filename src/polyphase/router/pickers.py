"""From scores to one worker."""

from __future__ import annotations

import math
from collections.abc import Sequence

from polyphase.core.errors import ConfigurationError
from polyphase.router.columns import best_row
from polyphase.router.contracts import Picker
from polyphase.router.lineup import Lineup

_WORD = (1 << 64) - 1


class HighestScore:
    """The best score; of equal ones the worker that was chosen longest ago.

    So nobody is favoured for a name or a place in a list, whatever requests come in between, and without scorers this is round robin.
    """

    def pick(self, scores: Sequence[float], workers: Lineup, turn: int) -> int:
        return best_row(scores, workers.standings.last_turns, workers.rows)


class Softmax:
    """By chance, better scores more often: in proportion to `score ** (1 / temperature)`, the softmax of the scores' logarithms.

    At 1 a worker that costs twice as much is chosen half as often, at 0.5 a quarter as often. Spreads what several routers or a wrong
    estimate would heap up. The chance is a hash of the turn: the same turns, the same choices.
    """

    def __init__(self, temperature: float) -> None:
        self._exponent = 1.0 / temperature

    def pick(self, scores: Sequence[float], workers: Lineup, turn: int) -> int:
        rows = range(len(scores)) if workers.rows is None else workers.rows
        best = max(scores[row] for row in rows)
        if best <= 0.0:
            return best_row(scores, workers.standings.last_turns, workers.rows)
        weights = [math.pow(scores[row] / best, self._exponent) for row in rows]
        left = fraction_of(turn) * math.fsum(weights)
        for row, weight in zip(rows, weights, strict=True):
            left -= weight
            if left < 0.0:
                return row
        return next(row for row in reversed(rows) if scores[row] == best)  # rounding left a crumb


def best(temperature: float) -> Picker:
    """The best score, equals in turn; with a temperature by chance, better scores more often."""
    if not (math.isfinite(temperature) and temperature >= 0.0):
        raise ConfigurationError(f"the temperature {temperature:g} is not a number from 0")
    # Below this, powers of any ratio are 0 or 1.
    return Softmax(temperature) if temperature > 1e-6 else HighestScore()


def fraction_of(turn: int) -> float:
    """A number in [0, 1) that looks drawn by lot. Source: SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Numbers, 2014)."""
    mixed = (turn * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & _WORD
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _WORD
    return ((mixed ^ (mixed >> 31)) >> 11) / (1 << 53)
