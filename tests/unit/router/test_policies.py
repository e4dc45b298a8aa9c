"""Policies as lists of parts: what holds for any list, what the named ones prefer, and what a wrong list is told."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyphase.core.errors import ConfigurationError, NoWorkers, PartFailed, Refused
from polyphase.core.ids import RequestId, WorkerId
from polyphase.router import BUILT_IN, POLICIES, Parts, PolicySettings, Router, RouterSettings, SplitRule, policy_of
from polyphase.router.lineup import Lineup
from polyphase.router.types import Leg, RouteRequest, WorkerView
from polyphase.wire.cards import Role
from polyphase.wire.events import BlocksStored, Load, Tier
from tests.unit.router.builders import facts, prefix, request, view


def scores(policy: str, workers: Sequence[WorkerView], leg: Leg = Leg.BOTH) -> list[float]:
    return list(policy_of(PolicySettings(policy)).weigh(request(), leg, Lineup.of_views(workers)).scores)


@pytest.mark.parametrize("policy", ["kv", "least-loaded"])
def test_a_busier_worker_scores_lower(policy: str):
    idle, *busier = scores(policy, [view(), view(prefill=500), view(blocks=200)])
    assert idle == 1.0
    assert max(busier) < 1.0


@pytest.mark.parametrize("policy", ["kv", "least-loaded"])
def test_a_worker_without_room_scores_lower_than_one_that_only_decodes_more(policy: str):
    full, busy = scores(policy, [view(blocks=100, block_count=100), view(blocks=150)])
    assert full < busy


def test_kv_prefers_the_cached_prefix_and_least_loaded_does_not_see_it():
    cold, warm = view(), view(overlap=40)
    assert scores("kv", [cold, warm])[1] == 1.0
    assert scores("least-loaded", [cold, warm]) == [1.0, 1.0]


def test_on_a_decode_leg_the_cache_counts_little():
    cold_idle, warm_busy = view(), view(overlap=64, blocks=100)
    assert scores("kv", [cold_idle, warm_busy], Leg.DECODE)[0] == 1.0
    assert scores("kv", [cold_idle, warm_busy])[1] == 1.0


def test_costs_by_part_add_up_to_the_score():
    router = Router(RouterSettings(PolicySettings(weights={"requests": 10.0})))
    for name in "abc":
        router.upsert_worker(facts(name))
    router.apply(WorkerId("b"), facts("b").epoch, [BlocksStored(list(prefix(1, 20)))])
    router.report_load(WorkerId("b"), facts("b").epoch, Load(running_count=4, used_block_count=10, waiting_prefill_tokens=100))
    candidates = router.route(request()).decode.candidates
    sums = [sum(cost for _, cost in candidate.costs) for candidate in candidates]
    assert [candidate.score for candidate in candidates] == pytest.approx([(min(sums) + 1) / (one + 1) for one in sums])
    of_b = next(candidate for candidate in candidates if candidate.worker_id == "b")
    assert dict(of_b.costs) == {"uncached": 3 * 44 * 16, "queued": 100, "decode": 0.25 * 160, "requests": 40}


# What holds for any list of parts

VIEWS = st.builds(
    view,
    overlap=st.integers(0, 64),
    prefill=st.integers(0, 100_000),
    blocks=st.integers(0, 2000),
    load=st.none() | st.builds(Load, waiting_prefill_tokens=st.integers(0, 10_000), used_block_count=st.integers(0, 1000)),
    labels=st.dictionaries(st.sampled_from(["zone", "rack"]), st.sampled_from("ab")),
)
WEIGHTS = st.dictionaries(st.sampled_from(list(BUILT_IN.scorers)), st.floats(0, 1e6) | st.integers(0, 100))
SETTINGS = st.builds(PolicySettings, name=st.sampled_from(list(POLICIES)), weights=WEIGHTS, temperature=st.sampled_from([0.0, 0.1, 2.0]))


@given(
    settings=SETTINGS,
    workers=st.lists(VIEWS, min_size=1, max_size=8),
    leg=st.sampled_from(Leg),
    turn=st.integers(0, 10**6),
    left=st.sets(st.integers(0, 7)),
)
def test_scores_are_fractions_and_one_of_the_rows_left_is_picked(
    settings: PolicySettings, workers: list[WorkerView], leg: Leg, turn: int, left: set[int]
):
    policy, lineup = policy_of(settings), Lineup.of_views(workers)
    lineup.rows = sorted(row for row in left if row < len(workers)) or None
    rows = range(len(workers)) if lineup.rows is None else lineup.rows
    found = policy.weigh(request(prefers={"zone": "a"}), leg, lineup).scores
    assert len(found) == len(workers)
    assert max(found) == 1.0
    assert all(0.0 < found[row] <= 1.0 if row in rows else found[row] == 0.0 for row in range(len(workers)))
    picked = policy.picker.pick(found, lineup, turn)
    assert picked in rows
    if not settings.temperature:
        assert found[picked] == 1.0


@given(settings=SETTINGS, steps=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 70), st.booleans(), st.booleans()), max_size=25))
def test_any_policy_routes_to_an_eligible_worker_and_books_consistently(settings: PolicySettings, steps: list[tuple[int, int, bool, bool]]):
    router = Router(RouterSettings(settings, SplitRule(min_uncached_tokens=64), max_waiting_requests=3))
    fleet = [facts("p", Role.PREFILL, labels={"zone": "a"}), facts("d", Role.DECODE, max_running=1), facts("e", labels={"zone": "a"})]
    for worker in fleet:
        router.upsert_worker(worker)
    for number, (name, blocks, is_excluding, ends) in enumerate(steps):
        excluded, requires = ("e",) if is_excluding else (), {} if name else {"zone": "a"}
        asked = request(str(number), prefix(name, blocks), session=name, excluded=excluded, requires=requires)
        try:
            route = router.route(asked)
        except Refused:
            continue
        finally:
            router.bookings.check()
        placements = [route.decode, *([route.prefill] if route.prefill else [])]
        for placement in placements:
            facts_there = next(worker for worker in fleet if worker.worker_id == placement.worker_id)
            assert placement.worker_id not in asked.excluded
            assert asked.required_labels.items() <= facts_there.labels.items()
            assert sum(candidate.worker_id == placement.worker_id for candidate in placement.candidates) == 1
            assert all(0.0 < candidate.score <= 1.0 for candidate in placement.candidates)
            assert placement.overlap_block_count * 16 < max(asked.prompt_token_count, 1)
        if ends:
            router.release(RequestId(str(number)))
    for number in range(len(steps)):
        router.release(RequestId(str(number)))
    assert router.bookings.total().is_zero()


# What a wrong list is told


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PolicySettings("kw"), "no router policy 'kw'; did you mean kv"),
        (PolicySettings("random"), "no router policy 'random'; choose one of kv, least-loaded, round-robin"),
        (PolicySettings(weights={"queue": 1.0}), "no router scorer 'queue'; did you mean queued"),
        (PolicySettings(weights={"queue": 0.0}), "no router scorer 'queue'"),
        (PolicySettings(weights={"queued": -1.0}), "the weight of 'queued' is -1.0; it must be a number from 0"),
        (PolicySettings(weights={"queued": float("nan")}), "the weight of 'queued' is nan"),
        (PolicySettings(filters=("ful",)), "no router filter 'ful'; did you mean full"),
        (PolicySettings(picker="bets"), "no router picker 'bets'; did you mean best"),
        (PolicySettings(temperature=-1), "temperature -1"),
    ],
)
def test_a_wrong_name_or_number_is_told_with_what_would_be_right(settings: PolicySettings, message: str):
    with pytest.raises(ConfigurationError, match=message):
        Router(RouterSettings(settings))


# Parts of somebody else's


class ByName:
    """Costs 10 for every place in the alphabet."""

    unit = "letters"

    def costs(self, request: RouteRequest, leg: Leg, workers: Lineup) -> Sequence[float] | None:
        return [10.0 * (ord(view.facts.worker_id[0]) - ord("a")) for view in workers]


class NoB:
    is_lasting = False

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        return [row for row in rows if workers.worker_ids[row] != "b"]

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        return NoWorkers("only b is there, and it may not", request_id=request.request_id)


class Last:
    def pick(self, scores: Sequence[float], workers: Lineup, turn: int) -> int:
        return (range(len(scores)) if workers.rows is None else workers.rows)[-1]


def make_last(temperature: float) -> Last:
    return Last()


def router_of(parts: Parts, settings: PolicySettings, names: str = "abc") -> Router:
    router = Router(RouterSettings(settings), parts=parts)
    for name in names:
        router.upsert_worker(facts(name))
    return router


def test_own_parts_stand_beside_ours():
    parts = BUILT_IN.with_part("letters", ByName()).with_part("no-b", NoB()).with_part("last", make_last)
    router = router_of(parts, PolicySettings(weights={"letters": 1000.0}))
    assert {router.route(request(str(n), prefix(n, 4))).decode.worker_id for n in range(5)} == {"a"}
    router = router_of(parts, PolicySettings(filters=("no-b",), picker="last"), "ab")
    assert {router.route(request(str(n), prefix(n, 4))).decode.worker_id for n in range(5)} == {"a"}
    assert len(router.route(request("x")).decode.candidates) == 1
    with pytest.raises(NoWorkers, match="only b is there"):
        router_of(parts, PolicySettings(filters=("no-b",)), "b").route(request())
    assert router_of(parts, PolicySettings(picker="last")).route(request()).decode.worker_id == "c"


def test_a_name_is_given_once_and_only_to_a_part():
    with pytest.raises(ConfigurationError, match="two router parts named 'queued'"):
        BUILT_IN.with_part("queued", ByName())
    with pytest.raises(ConfigurationError, match="which is no scorer"):
        BUILT_IN.with_part("thing", 3)  # type: ignore[arg-type]


class Broken:
    unit = "nothing"

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def costs(self, request: RouteRequest, leg: Leg, workers: Lineup) -> Sequence[float] | None:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], "gave 1 costs for 3 workers"),
        ([1.0, -2.0, 0.0], "gave a cost of -2"),
        ([1.0, float("nan"), 0.0], "gave a cost of nan"),
        ([1.0, 1e300, 0.0], "gave a cost of 1e"),
        (["x", "y", "z"], "raised ValueError"),
        (KeyError("zone"), r"raised KeyError\('zone'\)"),
    ],
)
def test_a_part_that_breaks_its_contract_is_named_and_books_nothing(answer: object, message: str):
    router = router_of(BUILT_IN.with_part("broken", Broken(answer)), PolicySettings(weights={"broken": 1.0}))
    with pytest.raises(PartFailed, match=f"the router part 'broken' {message}"):
        router.route(request())
    assert router.bookings.total().is_zero()


def test_a_filter_and_a_picker_that_break_their_contracts_are_named():
    class Adds(NoB):
        def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
            return [*rows, 7]

    class Outside(Last):
        def pick(self, scores: Sequence[float], workers: Lineup, turn: int) -> int:
            return 99

    with pytest.raises(PartFailed, match="'adds' kept rows that it was not given"):
        router_of(BUILT_IN.with_part("adds", Adds()), PolicySettings(filters=("adds",))).route(request())
    with pytest.raises(PartFailed, match="'outside' picked 99"):
        router_of(BUILT_IN.with_part("outside", lambda temperature: Outside()), PolicySettings(picker="outside")).route(request())


def test_tiers_are_weighed_by_what_bringing_them_up_costs():
    router = router_of(BUILT_IN, PolicySettings())
    for name, tier in (("a", Tier.DISK), ("b", Tier.DEVICE), ("c", Tier.HOST)):
        router.apply(WorkerId(name), facts(name).epoch, [BlocksStored(list(prefix(1, 40)), tier)])
    candidates = router.route(request()).decode.candidates
    held = [(one.worker_id, one.overlap_block_count, one.held_block_count) for one in candidates]
    assert held == [("b", 40, 40), ("c", 0, 40), ("a", 0, 40)]
    assert router.workers()[1].booked_prefill_tokens == 24 * 16
