"""Arithmetic on columns: the same to the last bit with and without the extension, and what it promises of scores."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyphase.router.columns import best_row, python_best_row, python_scores_of, scores_of

COSTS = st.floats(0, 1e12) | st.integers(0, 10**7)
COLUMNS = st.integers(1, 20).flatmap(
    lambda count: st.tuples(
        st.lists(st.lists(COSTS, min_size=count, max_size=count), max_size=4),
        st.lists(st.floats(0, 1e6), min_size=4, max_size=4),
        st.none() | st.lists(st.integers(0, count - 1), unique=True, min_size=1).map(sorted),
        st.just(count),
    )
)


@given(COLUMNS)
def test_scores_are_the_same_with_and_without_the_extension(case: tuple[list[list[float]], list[float], list[int] | None, int]):
    columns, weights, rows, count = case
    weights = weights[: len(columns)]
    expected = python_scores_of(count, columns, weights, rows)
    assert scores_of(count, columns, weights, rows) == expected
    assert scores_of(count, [array("d", column) for column in columns], weights, rows and array("q", rows)) == expected


@given(COLUMNS)
def test_the_cheapest_row_scores_one_and_cheaper_rows_never_score_less(case: tuple[list[list[float]], list[float], list[int] | None, int]):
    columns, weights, rows, count = case
    scores = scores_of(count, columns, weights[: len(columns)], rows)
    taking_part = range(count) if rows is None else rows
    costs = [sum(weight * column[row] for column, weight in zip(columns, weights, strict=False)) for row in range(count)]
    assert max(scores[row] for row in taking_part) == 1.0
    assert all(0.0 < scores[row] <= 1.0 for row in taking_part)
    assert all(scores[row] == 0.0 for row in range(count) if row not in taking_part)
    for row in taking_part:
        for other in taking_part:
            if costs[row] < costs[other]:
                assert scores[row] >= scores[other]


@given(
    st.lists(st.tuples(st.sampled_from([0.25, 0.5, 1.0]), st.integers(-5, 5)), min_size=1, max_size=12),
    st.sets(st.integers(0, 11), min_size=1),
)
def test_the_best_row_is_the_same_with_and_without_the_extension(table: list[tuple[float, int]], chosen: set[int]):
    scores, turns = array("d", (score for score, _ in table)), array("q", (turn for _, turn in table))
    rows = sorted(row for row in chosen if row < len(table)) or None
    picked = best_row(scores, turns, rows)
    assert picked == python_best_row(scores, turns, rows)
    among = range(len(table)) if rows is None else rows
    assert scores[picked] == max(scores[row] for row in among)
    assert turns[picked] == min(turns[row] for row in among if scores[row] == scores[picked])


@pytest.mark.parametrize("call", [scores_of, python_scores_of])
def test_columns_and_weights_that_do_not_fit_are_refused(call):
    with pytest.raises(ValueError):
        call(2, [[1.0, 2.0], [1.0]], [1.0, 1.0])
    with pytest.raises(ValueError):
        call(2, [[1.0, 2.0]], [1.0, 1.0])
    with pytest.raises(IndexError):
        call(2, [[1.0, 2.0]], [1.0], [0, 2])
    with pytest.raises(TypeError):
        call(1, [["much"]], [1.0])


@pytest.mark.parametrize("call", [best_row, python_best_row])
def test_nothing_to_choose_from_is_refused(call):
    with pytest.raises(ValueError, match="no row"):
        call(array("d"), array("q"))
    with pytest.raises(ValueError, match="lengths"):
        call(array("d", [1.0]), array("q"))
