"""One deployment at one load: TTFT, ITL and throughput, each with an interval and what it rests on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polyphase.advisor.calibration import Basis, Calibration
from polyphase.advisor.curves import DecodeCurves, PrefillCurves, decode_curves, prefill_curves
from polyphase.advisor.deployment import Setting, Traffic
from polyphase.advisor.mapping import Mappings, ParallelMapping
from polyphase.advisor.residual import quantities_of

_CENTRAL_80 = 1.2816
_FIRST = np.zeros(1, dtype=np.intp)


@dataclass(frozen=True, slots=True)
class Question:
    """`worker_count` engines of `mapping`; where prefill is apart, `prefill_worker_count` of `prefill_mapping`, perhaps on other
    accelerators. `concurrency` requests in all are always under way.
    """

    setting: Setting
    mapping: ParallelMapping
    concurrency: float
    traffic: Traffic
    worker_count: int = 1
    prefill_mapping: ParallelMapping | None = None
    prefill_worker_count: int = 0
    prefill_setting: Setting | None = None

    @property
    def gpu_count(self) -> int:
        prefill = self.prefill_worker_count * self.prefill_mapping.gpu_count if self.prefill_mapping else 0
        return self.worker_count * self.mapping.gpu_count + prefill


@dataclass(frozen=True, slots=True)
class Figure:
    """A value that lies within low … high in 80 of 100 cases. `deviation`: of its logarithm, before scaling to that share."""

    value: float
    low: float
    high: float
    deviation: float

    def covers(self, measured: float) -> bool:
        return self.low <= measured <= self.high


@dataclass(frozen=True, slots=True)
class Estimate:
    ttft_ms: Figure
    itl_ms: Figure
    tok_s: Figure  # output tokens a second of the whole deployment
    basis: Basis
    version: str  # of the engine that the estimate is for; empty: none in particular

    @property
    def tok_s_per_user(self) -> float:
        return 1e3 / self.itl_ms.value


def estimate(calibration: Calibration, question: Question) -> Estimate:
    """Cost: below a millisecond of CPU."""
    q = question
    traffic = q.traffic
    prefill_mapping = q.prefill_mapping or q.mapping
    prefill_setting = q.prefill_setting or q.setting
    ranks = q.prefill_worker_count * prefill_mapping.dp if q.prefill_mapping else q.worker_count * q.mapping.dp
    batch = np.array([q.concurrency / (q.worker_count * q.mapping.dp)])
    waiting = np.array([q.concurrency / ranks])
    decode = _decode(calibration, q.setting, q.mapping, traffic)
    prefill = _prefill(calibration, prefill_setting, prefill_mapping, traffic)
    itl_ms = decode.itl_ms(_FIRST, batch)
    ttft_ms = prefill.ttft_ms(_FIRST, waiting, np.array([q.concurrency]), itl_ms)
    if q.prefill_mapping:
        ttft_ms = prefill.saturated(_FIRST, ttft_ms, waiting, itl_ms)
    basis = calibration.basis(q.setting)
    itl = _figure(float(itl_ms[0]), _deviation(calibration, q.setting, q.mapping, batch, traffic, "itl"), calibration.scale("itl", basis))
    ttft_deviation = _deviation(calibration, prefill_setting, prefill_mapping, waiting, traffic, "ttft")
    ttft = _figure(float(ttft_ms[0]), ttft_deviation, calibration.scale("ttft", basis))
    tok_s, deviation = _throughput(q, ttft, itl)
    return Estimate(ttft, itl, _figure(tok_s, deviation, calibration.scale("tput", basis)), basis, calibration.version_of(q.setting))


def _throughput(q: Question, ttft: Figure, itl: Figure) -> tuple[float, float]:
    """And the deviation of its logarithm: of each part, by its share of a request's time."""
    decoding = itl.value * (q.traffic.osl - 1)
    whole = ttft.value + decoding
    deviation = float(np.hypot(ttft.deviation * ttft.value, itl.deviation * decoding) / whole)
    return q.concurrency * q.traffic.osl / (whole / 1e3), deviation


def _figure(value: float, deviation: float, scale: float) -> Figure:
    half = float(np.exp(_CENTRAL_80 * deviation * scale))
    return Figure(value, value / half, value * half, deviation)


def _deviation(
    calibration: Calibration, setting: Setting, mapping: ParallelMapping, load: np.ndarray, traffic: Traffic, quantity: str
) -> float:
    residual = calibration.itl_residual if quantity == "itl" else calibration.ttft_residual
    quantities = quantities_of(Mappings.of([mapping]), load, np.array([traffic.isl]), np.array([traffic.osl]))
    return float(residual.deviation(calibration.categories(setting), quantities)[0])


def _decode(calibration: Calibration, setting: Setting, mapping: ParallelMapping, traffic: Traffic) -> DecodeCurves:
    return decode_curves(calibration, setting, Mappings.of([mapping]), traffic)


def _prefill(calibration: Calibration, setting: Setting, mapping: ParallelMapping, traffic: Traffic) -> PrefillCurves:
    return prefill_curves(calibration, setting, Mappings.of([mapping]), traffic)
