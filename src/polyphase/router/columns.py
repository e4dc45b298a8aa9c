"""Arithmetic on whole columns of workers, a row per worker: in C++ where the extension is there, in Python with the same result to the last
bit elsewhere.

With 512 workers these loops were two thirds of a decision in Python.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TypeAlias

from polyphase.core import native

Column: TypeAlias = "array[float]"  # of doubles
Turns: TypeAlias = "array[int]"  # of 64-bit integers


def filled(count: int, value: float = 0.0) -> Column:
    return array("d", (value,)) * count


def scores_of(count: int, columns: list[Sequence[float]], weights: list[float], rows: Sequence[int] | None = None) -> Column:
    """Scores in (0, 1] of the costs `sum of weight x column`, row by row: (lowest + 1) / (cost + 1).

    The lowest cost gets 1, twice as much about one half, and equal costs equal scores; the 1 is one token. Costs are not negative.

    Args:
        columns: each of `count` rows.
        rows: those that take part (None: all); the others get 0.
    """
    if native.extension is not None:
        scores: Column = native.extension.scores_of(count, columns, weights, rows)
        return scores
    return python_scores_of(count, columns, weights, rows)


def python_scores_of(count: int, columns: list[Sequence[float]], weights: list[float], rows: Sequence[int] | None = None) -> Column:
    costs = [0.0] * count
    for column, weight in zip(columns, weights, strict=True):
        costs = [cost + weight * figure for cost, figure in zip(costs, column, strict=True)]
    taking_part = range(count) if rows is None else rows
    best = min((costs[row] for row in taking_part), default=0.0) + 1.0
    scores = filled(count)
    for row in taking_part:
        scores[row] = best / (costs[row] + 1.0)
    return scores


def best_row(scores: Sequence[float], last_turns: Sequence[int], rows: Sequence[int] | None = None) -> int:
    """The row with the highest score; of equal ones the one whose last turn is longest ago.

    Raises: ValueError without rows.
    """
    if native.extension is not None:
        row: int = native.extension.best_row(scores, last_turns, rows)
        return row
    return python_best_row(scores, last_turns, rows)


def python_best_row(scores: Sequence[float], last_turns: Sequence[int], rows: Sequence[int] | None = None) -> int:
    if len(scores) != len(last_turns):
        raise ValueError("columns of different lengths")
    taking_part = range(len(scores)) if rows is None else rows
    if not taking_part:
        raise ValueError("no row to choose from")
    best = max(scores[row] for row in taking_part)
    return min((row for row in taking_part if scores[row] == best), key=last_turns.__getitem__)
