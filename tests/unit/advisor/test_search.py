from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyphase.advisor.advice import Inquiry, advise, reasons
from polyphase.advisor.calibration import uncalibrated
from polyphase.advisor.catalog import shipped_calibration
from polyphase.advisor.deployment import Serving, Traffic
from polyphase.advisor.fleet import parse_fleet
from polyphase.advisor.goal import Goal, traffic_from_requests
from polyphase.advisor.points import NO_PREFILL, pareto, worst_excess
from polyphase.advisor.search import candidate_chunks, engines_for, search
from polyphase.advisor.sizing import size_for
from polyphase.core.errors import ConfigurationError

from .building import LIBRARY, setting

ROOFLINE = uncalibrated()
TRAFFIC = Traffic(2000, 300)


def inquiry(model: str = "llama-3.1-70b", fleet: str = "8xh200", goal: Goal | None = None, traffic: Traffic = TRAFFIC, **more) -> Inquiry:
    return Inquiry(LIBRARY.model(model), parse_fleet(fleet, LIBRARY), traffic, goal or Goal(), ("vllm",), ("fp8",), **more)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=40))
def test_the_frontier_of_two_is_what_brute_force_finds(points: list[tuple[int, int]]) -> None:
    columns = np.array(points, dtype=float).T
    kept = {points[row] for row in pareto(columns[0], columns[1])}
    beaten = {p for p in points if any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)}
    assert kept == set(points) - beaten


@given(st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=1, max_size=30))
def test_the_frontier_of_three_is_what_brute_force_finds(points: list[tuple[int, int, int]]) -> None:
    columns = np.array(points, dtype=float).T
    kept = {points[row] for row in pareto(*columns)}
    beaten = {p for p in points if any(q != p and all(a >= b for a, b in zip(q, p, strict=True)) for q in points)}
    assert kept == set(points) - beaten


@pytest.mark.parametrize("goal", [Goal(), Goal(ttft_ms=1500, itl_ms=25), Goal(latency_ms=9000, power_kw=9)])
def test_the_search_keeps_what_brute_force_over_its_candidates_keeps(goal: Goal) -> None:
    settings = [setting(serving=serving) for serving in Serving]
    fleet = parse_fleet("8xh200", LIBRARY)
    found = search(ROOFLINE, settings, fleet, TRAFFIC, goal)
    points = []
    for chunk in candidate_chunks(engines_for(ROOFLINE, settings, fleet, TRAFFIC), fleet, TRAFFIC):
        meets = worst_excess(chunk.excess(goal, TRAFFIC), len(chunk)) <= 1
        users, gpus = chunk.tok_s_per_user(), chunk.tok_s_per_fleet_gpu(TRAFFIC)
        points += [(bool(s), u, g) for s, u, g, m in zip(chunk.prefill == NO_PREFILL, users, gpus, meets, strict=True) if m]
    assert len(points) == found.fitting > 0
    f = found.frontier
    rows = zip(f.prefill == NO_PREFILL, f.tok_s_per_user(), f.tok_s_per_fleet_gpu(TRAFFIC), strict=True)
    for is_whole, user, gpu in rows:
        assert (bool(is_whole), user, gpu) in points
        assert not any(s == is_whole and u >= user and g >= gpu and (u, g) != (user, gpu) for s, u, g in points)
    for is_whole in (True, False):
        fastest = max(u for s, u, _ in points if s == is_whole)
        assert fastest == max(u for s, u in zip(f.prefill == NO_PREFILL, f.tok_s_per_user(), strict=True) if s == is_whole)


def test_every_answer_keeps_the_goal_and_the_fleet() -> None:
    goal = Goal(ttft_ms=1500, itl_ms=30, dollars_per_hour=20)
    answer = advise(ROOFLINE, inquiry(fleet="16xh200", goal=goal))
    assert answer.frontier
    for option in answer.frontier:
        assert option.estimate.ttft_ms.value <= 1500 * 1.0001
        assert option.estimate.itl_ms.value <= 30 * 1.0001
        assert option.dollars_per_hour <= 20
        assert option.gpu_count + option.idle_gpus == 16
        parts = [option.decode, *([option.prefill] if option.prefill else [])]
        assert option.units * sum(part.workers * part.mapping.gpu_count for part in parts) == option.gpu_count
        assert reasons(option, answer)
    assert answer.best[0].requests_per_s == max(option.requests_per_s for option in answer.frontier)


def test_a_search_and_an_estimate_tell_the_same() -> None:
    for option in advise(shipped_calibration(), inquiry(fleet="16xh200")).frontier:
        assert option.estimate.tok_s.value * option.units == pytest.approx(option.requests_per_s * TRAFFIC.osl, rel=1e-6)


def test_looser_goals_never_give_less() -> None:
    best = [
        max((o.requests_per_s for o in advise(ROOFLINE, inquiry(goal=Goal(itl_ms=itl, ttft_ms=2000))).frontier), default=0.0)
        for itl in (8, 12, 20, 40, 80)
    ]
    assert best == sorted(best)


def test_an_impossible_goal_names_the_nearest_and_the_bound() -> None:
    short = advise(ROOFLINE, inquiry(goal=Goal(itl_ms=0.5, ttft_ms=60_000))).shortfall
    assert short is not None
    assert short.bound == "itl_ms"
    assert short.reached == pytest.approx(short.option.estimate.itl_ms.value, rel=1e-3)
    assert short.factor == pytest.approx(short.reached / 0.5)
    # What it says is enough, is enough.
    again = advise(ROOFLINE, inquiry(goal=Goal(itl_ms=short.reached * 1.001, ttft_ms=60_000)))
    assert again.frontier


def test_a_model_that_fits_nowhere_is_told_by_how_much() -> None:
    with pytest.raises(ConfigurationError, match=r"deepseek-v3 does not fit on 4xh100: .* lacks \d+\.\d GB"):
        advise(ROOFLINE, inquiry("deepseek-v3", "4xh100"))


def test_disaggregation_alone_on_one_accelerator_is_told() -> None:
    with pytest.raises(ConfigurationError, match="leaves an accelerator for every part"):
        advise(ROOFLINE, inquiry("llama-3.1-8b", "1xh100", servings=(Serving.DISAGGREGATED,)))


@pytest.mark.parametrize(
    ("goal", "message"), [({"ttft_ms": 2000.0, "latency_ms": 1000.0}, "contradict each other"), ({"itl_ms": -1.0}, "must be more than 0")]
)
def test_contradictory_goals(goal: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        advise(ROOFLINE, inquiry(goal=Goal(**goal)))


def test_requests_longer_than_the_context() -> None:
    with pytest.raises(ConfigurationError, match=r"longer than what llama-3\.1-70b was made for"):
        advise(ROOFLINE, inquiry(traffic=Traffic(200_000, 100)))


def test_prefill_and_decode_on_different_accelerators() -> None:
    answer = advise(ROOFLINE, inquiry(fleet="8xh100+8xb200", servings=(Serving.DISAGGREGATED,)))
    pairs = {(o.prefill.setting.accelerator.name, o.decode.setting.accelerator.name) for o in answer.frontier if o.prefill}
    assert any(prefill != decode for prefill, decode in pairs)
    for option in answer.frontier:
        for name in ("h100", "b200"):
            parts = (option.decode, option.prefill)
            used = option.units * sum(p.workers * p.mapping.gpu_count for p in parts if p and p.setting.accelerator.name == name)
            assert used <= 8


def test_sizes_carry_the_rate_with_room_for_chance() -> None:
    goal = Goal(ttft_ms=2000, itl_ms=30)
    sizes = [size_for(ROOFLINE, inquiry(fleet="64xh200", goal=goal), rate) for rate in (1, 10, 100, 1000)]
    assert [size.gpu_count for size in sizes] == sorted(size.gpu_count for size in sizes)
    for size, rate in zip(sizes, (1, 10, 100, 1000), strict=True):
        assert size.units * size.option.requests_per_s >= rate
        assert size.slots_used < 1
    assert sizes[-1].slots_used > sizes[0].slots_used  # chance evens out
    assert not sizes[-1].is_within_fleet
    with pytest.raises(ConfigurationError, match="meets the goal at any rate"):
        size_for(ROOFLINE, inquiry(goal=Goal(itl_ms=0.1)), 10)


def test_a_distribution_becomes_its_mean_load() -> None:
    traffic = traffic_from_requests([1000, 8000], [200, 400], weights=[0.75, 0.25])
    assert traffic.isl == pytest.approx(2750)
    assert traffic.osl == pytest.approx(250)
    assert traffic.context_tokens == pytest.approx((0.75 * 200 * 1100 + 0.25 * 400 * 8200) / 250)
    assert traffic.whole_tokens == 8400
    with pytest.raises(ConfigurationError, match="holds no requests"):
        traffic_from_requests([], [])


@pytest.mark.parametrize("text", ["h200", "0xh200", "16 of h200", "x", "", "4xh200+"])
def test_nonsense_for_a_fleet_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"is not a fleet; write for example 16xh200|between 1 and"):
        parse_fleet(text, LIBRARY)


def test_a_fleet_adds_up() -> None:
    fleet = parse_fleet("8xh200 + 8xB200_SXM+8xh200", LIBRARY)
    assert str(fleet) == "16xh200+8xb200"
