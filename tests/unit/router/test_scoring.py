from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyphase.core.errors import ConfigurationError
from polyphase.router.columns import python_scores_of_costs, scores_of_costs
from polyphase.router.cost import block_count_needed, queued_prefill_tokens, uncached_tokens, used_block_count
from polyphase.router.lineup import Lineup
from polyphase.router.pickers import HighestScore
from polyphase.router.policies import POLICIES, policy_named
from polyphase.router.types import Leg, WorkerView
from polyphase.wire.events import Load
from tests.unit.router.builders import facts, request

NUMBERS = itertools.count()


def view(
    name: str | None = None, *, overlap: int = 0, prefill: int = 0, blocks: int = 0, load: Load | None = None, block_count: int = 1000
):
    return WorkerView(facts(name or f"w{next(NUMBERS)}", block_count=block_count), load, overlap, prefill, blocks, 0)


def test_a_fully_cached_prompt_still_computes_one_token():
    assert uncached_tokens(request(), view(overlap=64)) == 1
    assert uncached_tokens(request(), view(overlap=60)) == 64
    assert uncached_tokens(request(hashes=[], tokens=0), view()) == 0


def test_blocks_needed_count_the_answer_but_not_its_whole_bound():
    assert block_count_needed(request(output=16), 16, Leg.BOTH) == 65
    assert block_count_needed(request(output=100_000), 16, Leg.BOTH) == 72
    assert block_count_needed(request(output=16), 16, Leg.PREFILL) == 64
    assert block_count_needed(request(hashes=[], tokens=1, output=1), 16, Leg.BOTH) == 1


def test_reported_load_and_bookings_are_not_added_up():
    load = Load(waiting_prefill_tokens=900, used_block_count=50)
    same_requests = WorkerView(facts("w"), load, 0, 900, 50, 1)
    assert (queued_prefill_tokens(same_requests), used_block_count(same_requests)) == (900, 50)
    ours_came_after = WorkerView(facts("w"), load, 0, 100, 7, 1, unreported_prefill_tokens=100, unreported_block_count=7)
    assert (queued_prefill_tokens(ours_came_after), used_block_count(ours_came_after)) == (1000, 57)
    not_yet_reported = WorkerView(facts("w"), None, 0, 100, 7, 1, 100, 7)
    assert (queued_prefill_tokens(not_yet_reported), used_block_count(not_yet_reported)) == (100, 7)


@pytest.mark.parametrize("policy", ["kv", "least-loaded"])
def test_a_busier_worker_scores_lower(policy: str):
    idle, queued, decoding = view(), view(prefill=500), view(blocks=200)
    scores = policy_named(policy).score(request(), Leg.BOTH, Lineup.of_views([idle, queued, decoding]))
    assert scores[0] == 1.0
    assert max(scores[1:]) < 1.0


@pytest.mark.parametrize("policy", ["kv", "least-loaded"])
def test_a_worker_without_room_scores_lower_than_one_that_only_decodes_more(policy: str):
    full, busy = view(blocks=100, block_count=100), view(blocks=150)
    scores = policy_named(policy).score(request(), Leg.BOTH, Lineup.of_views([full, busy]))
    assert scores[0] < scores[1]


def test_kv_prefers_the_cached_prefix_and_least_loaded_does_not_see_it():
    cold, warm = view(), view(overlap=40)
    assert policy_named("kv").score(request(), Leg.BOTH, Lineup.of_views([cold, warm]))[1] == 1.0
    assert policy_named("least-loaded").score(request(), Leg.BOTH, Lineup.of_views([cold, warm])) == [1.0, 1.0]


def test_on_a_decode_leg_the_cache_counts_little():
    cold_idle, warm_busy = view(), view(overlap=64, blocks=100)
    assert policy_named("kv").score(request(), Leg.DECODE, Lineup.of_views([cold_idle, warm_busy]))[0] == 1.0
    assert policy_named("kv").score(request(), Leg.BOTH, Lineup.of_views([cold_idle, warm_busy]))[1] == 1.0


views = st.builds(
    view,
    overlap=st.integers(0, 64),
    prefill=st.integers(0, 100_000),
    blocks=st.integers(0, 2000),
    load=st.none() | st.builds(Load, waiting_prefill_tokens=st.integers(0, 10_000), used_block_count=st.integers(0, 1000)),
)


@pytest.mark.parametrize("policy", POLICIES)
@given(workers=st.lists(views, min_size=1, max_size=8), leg=st.sampled_from(Leg), turn=st.integers(0, 100))
def test_scores_are_fractions_and_one_worker_is_picked(policy: str, workers: list[WorkerView], leg: Leg, turn: int):
    made = policy_named(policy)
    scores = made.score(request(), leg, Lineup.of_views(workers))
    assert len(scores) == len(workers)
    assert all(0.0 <= score <= 1.0 for score in scores)
    picked = made.picker.pick(scores, Lineup.of_views(workers), turn)
    assert scores[picked] == max(scores)


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=6))
def test_lower_cost_never_scores_lower(costs: list[float]):
    scores = scores_of_costs(costs, [0] * len(costs))
    assert scores[costs.index(min(costs))] == 1.0
    for cost, score in zip(costs, scores, strict=True):
        for other_cost, other_score in zip(costs, scores, strict=True):
            if cost <= other_cost:
                assert score >= other_score


COLUMN = st.lists(st.tuples(st.floats(0, 1e12), st.integers(0, 10**7)), max_size=20)


@given(COLUMN, st.sampled_from([1.0, 0.05]))
def test_scores_are_the_same_to_the_last_bit_with_and_without_the_extension(rows: list[tuple[float, int]], weight: float):
    loads, tokens = [load for load, _ in rows], [count for _, count in rows]
    assert scores_of_costs(loads, tokens, weight) == python_scores_of_costs(loads, tokens, weight)


def test_columns_of_different_lengths_are_refused():
    for call in (scores_of_costs, python_scores_of_costs):
        with pytest.raises(ValueError):
            call([1.0, 2.0], [1])


def test_a_lineup_is_a_sequence_of_views():
    views = [view("a", overlap=3), view("b", prefill=7), view("c", overlap=5, blocks=2)]
    lineup = Lineup.of_views(views)
    assert (list(lineup), len(lineup), lineup[1:], lineup[-1]) == (views, 3, views[1:], views[2])
    assert lineup.overlap_block_counts() == [3, 0, 5]
    assert lineup.tokens_beyond(60, at_least=1) == [12, 60, 1]


def test_ties_take_turns_and_only_ties():
    workers = [view(name) for name in "abcd"]
    picked = Counter(HighestScore().pick([0.5, 1.0, 1.0, 1.0], Lineup.of_views(workers), turn) for turn in range(30))
    assert picked == {1: 10, 2: 10, 3: 10}


def test_an_unknown_policy_names_those_that_exist():
    with pytest.raises(ConfigurationError, match="kv, least-loaded, round-robin"):
        policy_named("random")
