"""Who is picked among equals, and how often with a temperature."""

from __future__ import annotations

import random
from array import array
from collections import Counter

import pytest

from polyphase.core.errors import ConfigurationError
from polyphase.router import Router
from polyphase.router.lineup import Lineup
from polyphase.router.pickers import HighestScore, Softmax, best, fraction_of
from polyphase.router.types import RouterSettings
from tests.unit.router.builders import facts, prefix, request, view


def chi_square(counts: Counter[int], expected: dict[int, float]) -> float:
    return sum((counts[row] - count) ** 2 / count for row, count in expected.items())


def lineup(count: int, rows: list[int] | None = None) -> Lineup:
    made = Lineup.of_views([view() for _ in range(count)])
    made.rows = rows
    return made


def test_the_best_is_picked_and_of_equals_the_one_that_waited_longest():
    workers = lineup(4)
    workers.standings.last_turns = array("q", [9, 5, 3, 7])
    assert HighestScore().pick(array("d", [0.5, 1.0, 1.0, 1.0]), workers, 0) == 2
    workers.rows = [0, 1, 3]
    assert HighestScore().pick(array("d", [0.5, 1.0, 0.0, 1.0]), workers, 0) == 1


def test_ties_have_no_favourite_whatever_comes_in_between():
    """Two kinds of requests in strict alternation, each for half of the workers: a count of turns would serve one of each half."""
    workers = lineup(4)
    chosen: Counter[int] = Counter()
    for turn in range(400):
        workers.rows = [0, 1] if turn % 2 else [2, 3]
        row = HighestScore().pick(array("d", [1.0] * 4), workers, turn)
        workers.standings.last_turns[row] = turn
        chosen[row] += 1
    assert set(chosen.values()) == {100}


def test_routers_that_begin_elsewhere_begin_with_any_worker():
    """Over many frontends, the first of equal workers is each as often as chance would have it (chi-square, 7 degrees, p > 0.001)."""
    firsts: Counter[int] = Counter()
    for seed in range(4000):
        router = Router(RouterSettings(first_turn=seed))
        for number in range(8):
            router.upsert_worker(facts(f"w{number}"))
        firsts[int(router.route(request("r", prefix(1, 3))).decode.worker_id[1:])] += 1
    assert chi_square(firsts, dict.fromkeys(range(8), 500.0)) < 24.3


@pytest.mark.parametrize(("temperature", "shares"), [(1.0, [4, 2, 1, 0]), (0.5, [16, 4, 1, 0])])
def test_with_a_temperature_ratios_of_scores_become_ratios_of_counts(temperature: float, shares: list[int]):
    """Chi-square, 2 degrees, p > 0.001."""
    picker, workers = best(temperature), lineup(4)
    scores = array("d", [1.0, 0.5, 0.25, 0.0])
    turns = 21_000
    chosen = Counter(picker.pick(scores, workers, turn) for turn in range(turns))
    assert chosen[3] == 0
    whole = sum(shares)
    assert chi_square(chosen, {row: turns * share / whole for row, share in enumerate(shares) if share}) < 13.8


def test_a_temperature_picks_only_what_filters_left_and_the_same_for_the_same_turn():
    scores = array("d", [0.0, 0.9, 1.0])
    first = [Softmax(0.7).pick(scores, lineup(3, [1, 2]), turn) for turn in range(200)]
    assert set(first) == {1, 2}
    assert first == [Softmax(0.7).pick(scores, lineup(3, [1, 2]), turn) for turn in range(200)]


def test_a_low_temperature_is_nearly_the_best_and_none_is_exactly():
    draw = random.Random(5)
    for _ in range(100):
        scores = array("d", [draw.uniform(0.01, 0.9), 1.0, draw.uniform(0.01, 0.9)])
        assert best(0.001).pick(scores, lineup(3), draw.randrange(10**9)) == 1
    assert isinstance(best(0.0), HighestScore)


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_a_temperature_is_a_number_from_zero(temperature: float):
    with pytest.raises(ConfigurationError, match="temperature"):
        best(temperature)


def test_a_turn_is_as_good_as_a_lot():
    """Ten equal bins of 10,000 turns in a row (chi-square, 9 degrees, p > 0.001)."""
    counts = Counter(int(10 * fraction_of(turn)) for turn in range(10_000))
    assert chi_square(counts, dict.fromkeys(range(10), 1000.0)) < 27.9
