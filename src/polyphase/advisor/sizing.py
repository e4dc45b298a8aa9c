"""How many accelerators a request rate needs, at a goal.

Requests arrive at random, so the number under way strays around its mean L = rate × latency like a Poisson variable. A fleet has room
enough if L + z·√L requests fit into the batches at which the goal is still met (the square-root rule of staffing; Halfin and Whitt,
1981); with z = 1.64, 19 of 20 arrivals find room at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from polyphase.advisor.advice import Inquiry, Option, option_at, settings_for, why_nothing_fits
from polyphase.advisor.calibration import Calibration
from polyphase.advisor.mapping import Floats
from polyphase.advisor.points import Candidates, worst_excess
from polyphase.advisor.search import Engines, Found, candidate_chunks, engines_for
from polyphase.core.errors import ConfigurationError

MAX_RATE_PER_S = 1e9
_SAFETY = 1.64


@dataclass(frozen=True, slots=True)
class Sizing:
    """`option` is one unit; `units` of them carry the rate. `slots_used`: mean requests under way over what there is room for."""

    option: Option
    units: int
    gpu_count: int
    slots_used: float
    is_within_fleet: bool


def size_for(calibration: Calibration, inquiry: Inquiry, rate_per_s: float, on_progress: Callable[[int], None] = lambda _: None) -> Sizing:
    """The fewest accelerators; of equally many the deployment with the shorter latency. The fleet's counts only bound one unit.

    Raises: ConfigurationError if the rate is not positive, nothing fits, or nothing meets the goal at any rate.
    """
    if not 0 < rate_per_s <= MAX_RATE_PER_S:
        raise ConfigurationError(
            f"a rate of {rate_per_s:g} requests a second cannot be planned for; give more than 0 and at most {MAX_RATE_PER_S:g}"
        )
    inquiry.goal.check_against(inquiry.traffic)
    # Bounds on power and price are on the whole, which is what is being looked for.
    goal = replace(inquiry.goal, power_kw=None, dollars_per_hour=None)
    settings = settings_for(inquiry)
    engines = engines_for(calibration, settings, inquiry.fleet, inquiry.traffic)
    best: Candidates | None = None
    best_units, best_key, evaluated = 0, (np.inf, np.inf), 0
    for chunk in candidate_chunks(engines, inquiry.fleet, inquiry.traffic):
        evaluated += len(chunk)
        on_progress(evaluated)
        meets = np.flatnonzero(worst_excess(chunk.excess(goal, inquiry.traffic), len(chunk)) <= 1.0)
        if not len(meets):
            continue
        one = chunk.take(meets)
        units = units_needed(one, inquiry, rate_per_s)
        gpus = units * one.gpu_count / one.units
        row = int(np.lexsort((one.latency_ms(inquiry.traffic), gpus))[0])
        key = (float(gpus[row]), float(one.latency_ms(inquiry.traffic)[row]))
        if key < best_key:
            best, best_units, best_key = one.take(np.array([row])), int(units[row]), key
    if best is None:
        if not engines:
            raise ConfigurationError(why_nothing_fits(inquiry, settings))
        raise ConfigurationError(
            f"no deployment of {inquiry.shape.name} on {inquiry.fleet} meets the goal at any rate; "
            "ask without a rate to see which bound is in the way"
        )
    return _sizing(calibration, tuple(engines), best, best_units, inquiry, rate_per_s)


def units_needed(candidates: Candidates, inquiry: Inquiry, rate_per_s: float) -> Floats:
    """float64[n]."""
    under_way = rate_per_s * candidates.latency_ms(inquiry.traffic) / 1e3
    return np.ceil((under_way + _SAFETY * np.sqrt(under_way)) / candidates.concurrency)


def _sizing(
    calibration: Calibration, engines: tuple[Engines, ...], best: Candidates, units: int, inquiry: Inquiry, rate_per_s: float
) -> Sizing:
    per_unit = best.gpu_count / best.units
    share = 1 / best.units
    unit = replace(
        best,
        units=np.ones(1),
        gpu_count=per_unit,
        pool_gpus=per_unit,
        power_kw=best.power_kw * share,
        dollars_per_hour=best.dollars_per_hour * share,
    )
    found = Found(engines, unit, unit, 0, 0)
    option = option_at(calibration, found, unit, 0, inquiry)
    gpu_count = units * int(per_unit[0])
    under_way = rate_per_s * float(best.latency_ms(inquiry.traffic)[0]) / 1e3
    return Sizing(option, units, gpu_count, under_way / (units * option.concurrency), gpu_count <= inquiry.fleet.gpu_count)
