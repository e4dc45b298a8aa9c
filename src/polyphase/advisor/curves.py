"""Times of engines as curves over their load: computed once for a mapping, then looked up for any batch, by a single estimate and a
search alike.

A curve never falls: where the learned residual would let a larger batch have shorter steps, the step of the smaller batch counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polyphase.advisor.calibration import Calibration
from polyphase.advisor.deployment import Setting, Traffic
from polyphase.advisor.mapping import Floats, Mappings
from polyphase.advisor.residual import quantities_of
from polyphase.advisor.terms import BURST, TTFT_TERMS, itl_terms, ttft_terms

_PER_DOUBLING = 2
GRID = np.arange(0, 14 * _PER_DOUBLING + 1) / _PER_DOUBLING  # log2 of the batch: 1 to 16,384
BATCHES = 2.0**GRID
_T = {name: index for index, name in enumerate(TTFT_TERMS)}
_MAX_UTILISATION = 0.95
Index = NDArray[np.intp]


def lookup(table: Floats, rows: Index, values: Floats) -> Floats:
    """table float64[m, len(GRID)] at (rows, values), both [n]: linear over the logarithm of `values`."""
    place = np.clip(np.log2(values) * _PER_DOUBLING, 0.0, len(GRID) - 1.000001)
    low = place.astype(np.intp)
    share = place - low
    flat = rows * len(GRID) + low
    below = table.ravel()[flat]
    return np.asarray(below + share * (table.ravel()[flat + 1] - below))


@dataclass(frozen=True, slots=True)
class DecodeCurves:
    """log_itl: float64[m, len(GRID)], natural logarithm of ms, over the batch per rank."""

    mappings: Mappings
    log_itl: Floats

    def itl_ms(self, rows: Index, batch: Floats) -> Floats:
        return np.exp(lookup(self.log_itl, rows, np.maximum(batch, 1.0)))


def decode_curves(calibration: Calibration, setting: Setting, mappings: Mappings, traffic: Traffic) -> DecodeCurves:
    count = len(mappings)
    spread = mappings.take(np.repeat(np.arange(count), len(GRID)))
    batch = np.tile(BATCHES, count)
    terms = itl_terms(setting, spread, batch, traffic)
    weights = calibration.weights("itl", setting)
    log_itl = np.log(terms @ weights).reshape(count, len(GRID))
    log_itl = log_itl + calibration.itl_residual.grid_mean(calibration.categories(setting), _rows(mappings, traffic), GRID)
    return DecodeCurves(mappings, np.maximum.accumulate(log_itl, axis=1))


@dataclass(frozen=True, slots=True)
class PrefillCurves:
    """TTFT = exp(residual over the load) times a sum of parts, which depend on the load, the concurrency and the ITL beside it."""

    mappings: Mappings
    alone_ms: Floats  # float64[m]: without load
    rough_ms: Floats  # about what a prompt keeps a rank busy for
    service_ms: Floats  # the same with the learned weights: a rank can do no more than one prompt in that time
    log_residual: Floats  # float64[m, len(GRID)], over the requests per rank
    weights: Floats  # of TTFT_TERMS
    burst: Floats  # float64[m]: ms per waiting request
    osl: float

    def ttft_ms(self, rows: Index, waiting: Floats, concurrency: Floats, itl_ms: Floats) -> Floats:
        """All [n]. `waiting`: requests in the deployment for each rank that prefills."""
        rough = self.rough_ms[rows]
        busy = np.minimum(waiting * rough / (self.osl * itl_ms), _MAX_UTILISATION)
        step = self.weights[_T["step_shared"]] + self.weights[_T["step_own"]]
        total = self.alone_ms[rows] + self.burst[rows] * waiting + self.weights[_T["queue"]] * rough * busy / (1 - busy)
        total += step * itl_ms + self.weights[_T["concurrency"]] * concurrency
        return np.asarray(total * np.exp(lookup(self.log_residual, rows, np.maximum(waiting, 1.0))))

    def saturated(self, rows: Index, ttft_ms: Floats, waiting: Floats, itl_ms: Floats) -> Floats:
        """TTFT of prefill workers of their own: what they cannot do in time waits with them, not in decode, so that no more requests come
        through than they can prefill. `ttft_ms`, `waiting`, `itl_ms`: [n], as for `ttft_ms`.
        """
        return np.maximum(ttft_ms, waiting * self.service_ms[rows] - self.osl * itl_ms)


def prefill_curves(calibration: Calibration, setting: Setting, mappings: Mappings, traffic: Traffic) -> PrefillCurves:
    count = len(mappings)
    one = np.ones(count)
    # With a load and a step of (almost) nothing, what remains are the parts that do not depend on them.
    terms = ttft_terms(setting, mappings, one, 0 * one, one, traffic)
    weights = calibration.weights("ttft", setting)
    own = [name for name in TTFT_TERMS if name not in ("burst", "queue", "step_shared", "step_own", "concurrency")]
    chosen = [_T[name] for name in own]
    busy = [_T[name] for name in ("flops", "attention", "comm", "weights", "layers")]
    effective = weights.copy()
    for name in ("step_shared", "step_own"):
        effective[_T[name]] *= terms[0, _T[name]]  # 1 for the one that there is in this kind of serving, 0 for the other
    return PrefillCurves(
        mappings,
        terms[:, chosen] @ weights[chosen],
        terms[:, _T["burst"]] / BURST,
        terms[:, busy] @ weights[busy],
        calibration.ttft_residual.grid_mean(calibration.categories(setting), _rows(mappings, traffic), GRID),
        effective,
        terms[:, _T["burst"]] * weights[_T["burst"]],
        traffic.osl,
    )


def _rows(mappings: Mappings, traffic: Traffic) -> Floats:
    one = np.ones(len(mappings))
    return quantities_of(mappings, one, traffic.isl * one, traffic.osl * one)[:, 1:]
