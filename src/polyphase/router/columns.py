"""Arithmetic on whole columns of workers: in C++ where the extension is there, in Python with the same result to the last bit elsewhere.

With 512 workers these loops were two thirds of a decision in Python.
"""

from __future__ import annotations

from polyphase.core import native


def scores_of_costs(loads: list[float], tokens: list[int], weight: float = 1.0) -> list[float]:
    """Scores in (0, 1] of the costs `loads + weight * tokens`, row by row: (lowest + 1) / (cost + 1).

    The lowest cost gets 1, twice as much about one half, and equal costs equal scores; the 1 is one token. Costs are not negative.
    """
    if native.extension is not None:
        scores: list[float] = native.extension.scores_of_costs(loads, tokens, weight)
        return scores
    return python_scores_of_costs(loads, tokens, weight)


def python_scores_of_costs(loads: list[float], tokens: list[int], weight: float = 1.0) -> list[float]:
    costs = [load + weight * count for load, count in zip(loads, tokens, strict=True)]
    best = min(costs, default=0.0) + 1.0
    return [best / (cost + 1.0) for cost in costs]
