"""Predictions beside measurements: errors in percent, in total and by group, and how often intervals cover."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyphase.advisor.calibration import Calibration
from polyphase.advisor.deployment import Traffic
from polyphase.advisor.estimate import Question, estimate
from polyphase.advisor.measurements import Measurement, throughput

_CENTRAL_80 = 1.2816  # standard deviations either side


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one measurement: natural logarithms of the ratio predicted / measured, and the model's own unscaled deviations of them."""

    measurement: Measurement
    itl_error: float
    ttft_error: float
    tput_error: float
    itl_deviation: float
    ttft_deviation: float
    tput_deviation: float
    is_covered: tuple[bool, bool, bool]  # measured within the interval: ITL, TTFT, throughput
    basis: str


def predict(calibration: Calibration, measurements: Sequence[Measurement]) -> list[Prediction]:
    return [_predict(calibration, measurement) for measurement in measurements]


def _predict(calibration: Calibration, m: Measurement) -> Prediction:
    question = Question(
        setting=m.setting,
        mapping=m.mapping,
        worker_count=m.worker_count,
        prefill_mapping=m.prefill_mapping if m.prefill_worker_count else None,
        prefill_worker_count=m.prefill_worker_count,
        concurrency=m.concurrency,
        traffic=Traffic(m.isl, m.osl),
    )
    found = estimate(calibration, question)
    measured = throughput(m.concurrency, m.osl, m.ttft_ms, m.itl_ms)
    return Prediction(
        m,
        float(np.log(found.itl_ms.value / m.itl_ms)),
        float(np.log(found.ttft_ms.value / m.ttft_ms)),
        float(np.log(found.tok_s.value / measured)),
        found.itl_ms.deviation,
        found.ttft_ms.deviation,
        found.tok_s.deviation,
        (found.itl_ms.covers(m.itl_ms), found.ttft_ms.covers(m.ttft_ms), found.tok_s.covers(measured)),
        found.basis.name.lower(),
    )


def quantile_scale(predictions: Sequence[Prediction], quantity: str, share: float) -> float:
    """The factor on deviations with which `share` of the measurements lie within ± 1.28 of them."""
    errors = np.array([abs(getattr(p, f"{quantity}_error")) / (_CENTRAL_80 * getattr(p, f"{quantity}_deviation")) for p in predictions])
    return float(np.quantile(errors, share))


def coverage_of_halves(predictions: Sequence[Prediction]) -> dict[str, float]:
    """How often intervals cover, in percent, each half of the measurements with the scale that suits the other half. Measurements of one
    configuration are in one half.
    """
    halves: tuple[list[Prediction], list[Prediction]] = ([], [])
    for prediction in predictions:
        halves[zlib.crc32(repr(prediction.measurement.configuration).encode()) % 2].append(prediction)
    covered = {}
    for quantity, prefix in (("itl", ""), ("ttft", "ttft_"), ("tput", "tput_")):
        inside = 0.0
        for own, other in (halves, halves[::-1]):
            reach = quantile_scale(other, quantity, 0.8) * _CENTRAL_80 if other else 0.0
            inside += sum(abs(getattr(p, f"{quantity}_error")) <= reach * getattr(p, f"{quantity}_deviation") for p in own)
        covered[f"{prefix}interval80_coverage_pct"] = round(100 * inside / len(predictions), 1)
    return covered


def errors(predictions: Sequence[Prediction]) -> dict[str, float]:
    """The figures of `polyphase advisor evaluate`, in percent of the measured value."""
    itl, ttft, tput = (_percent([getattr(p, f"{name}_error") for p in predictions]) for name in ("itl", "ttft", "tput"))
    covered = np.array([p.is_covered for p in predictions]).mean(axis=0) * 100
    return {
        "count": len(predictions),
        "itl_median_pct": round(float(np.median(itl)), 2),
        "itl_mean_pct": round(float(np.mean(itl)), 2),
        "itl_p90_pct": round(float(np.quantile(itl, 0.9)), 2),
        "tput_median_pct": round(float(np.median(tput)), 2),
        "tput_p90_pct": round(float(np.quantile(tput, 0.9)), 2),
        "ttft_median_pct": round(float(np.median(ttft)), 2),
        "ttft_p90_pct": round(float(np.quantile(ttft, 0.9)), 2),
        "interval80_coverage_pct": round(float(covered[0]), 1),
        "ttft_interval80_coverage_pct": round(float(covered[1]), 1),
        "tput_interval80_coverage_pct": round(float(covered[2]), 1),
    }


_GROUPS: Mapping[str, Callable[[Prediction], str]] = {
    "backend": lambda p: p.measurement.setting.backend,
    "system": lambda p: p.measurement.setting.accelerator.name,
    "model": lambda p: p.measurement.setting.shape.name,
    "mode": lambda p: p.measurement.setting.serving.value,
    "precision": lambda p: p.measurement.setting.precision.name,
    "lengths": lambda p: f"{p.measurement.isl}/{p.measurement.osl}",
    "basis": lambda p: p.basis,
}


def errors_by_group(predictions: Sequence[Prediction]) -> dict[str, dict[str, dict[str, float]]]:
    """`{"backend": {"vllm": {…}}}`, largest groups first."""
    result: dict[str, Any] = {}
    for kind, key in _GROUPS.items():
        groups: dict[str, list[Prediction]] = defaultdict(list)
        for prediction in predictions:
            groups[key(prediction)].append(prediction)
        result[kind] = {name: errors(members) for name, members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))}
    return result


def _percent(log_errors: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(np.abs(np.expm1(np.asarray(log_errors, dtype=np.float64))) * 100)
