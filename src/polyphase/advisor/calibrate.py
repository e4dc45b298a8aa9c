"""From measurements to a calibration, and its errors on measurements that it has not seen."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from polyphase.advisor.calibration import Basis, Calibration, category_words, groups_of
from polyphase.advisor.deployment import Traffic
from polyphase.advisor.efficiency import ITL_PRIORS, TTFT_PRIORS, Efficiency, fit_efficiency
from polyphase.advisor.evaluation import Prediction, coverage_of_halves, errors, predict, quantile_scale
from polyphase.advisor.mapping import Floats, Mappings, ParallelMapping
from polyphase.advisor.measurements import Measurement
from polyphase.advisor.residual import CATEGORIES, Component, Points, choose_support, encode, fit_residual, quantities_of
from polyphase.advisor.terms import itl_terms, ttft_terms
from polyphase.core.errors import ConfigurationError

FOLD_COUNT = 5
SUPPORT_COUNT = 400
# Orders: CATEGORIES, QUANTITIES. Set by hand, and kept among some six variants with an eye on the cross-validated errors, so that these are
# a little flattered: how deployments of a kind stray together, how one deployment does over mappings and lengths, and what is left.
# Maximising the marginal likelihood instead helped configurations by 0.4 points and hurt unseen pairs by 1.5.
KERNEL = (
    Component(0.15, (0.40, 0.6, 0.8, 0.30, 0.7, 0.6, 0.9), (6.0, 4.0, 5.0, 3.0, 3.0, 3.0)),
    Component(0.12, (0.05, 0.3, 0.4, 0.05, 0.3, 0.3, 0.5), (2.5, 2.0, 2.5, 1.2, 1.2, 1.5)),
    Component(0.05, (0.01, 0.01, 0.01, 0.01, 0.1, 0.1, 0.2), (1.2, 1.0, 1.0, 0.7, 0.7, 0.7)),
)
NOISE = 0.05
TTFT_FACTOR = 2.0  # TTFT strays about twice as far as ITL
_FEWEST = 20
_STRANGER = 1.5  # wider than for a generation held out: those measured are of one vendor, and resemble each other
Progress = Callable[[str], None]


def calibrate(measurements: Sequence[Measurement], support_count: int = SUPPORT_COUNT) -> Calibration:
    """Intervals are not scaled yet: `cross_validated` does both. Raises: ConfigurationError with too few measurements.

    Cost: about 3 s of CPU for 2,600 measurements.
    """
    unique = list({m.identity: m for m in measurements if not m.is_doubtful}.values())
    if len(unique) < _FEWEST:
        raise ConfigurationError(f"{len(unique)} usable measurements are too few to calibrate on; at least {_FEWEST} are needed")
    words = [category_words(m.setting, m.setting.version or "") for m in unique]
    vocabularies = {name: sorted({w[name] for w in words}) for name in CATEGORIES}
    points = Points(np.array([encode(vocabularies, w) for w in words]), _quantities(unique))
    log_itl = np.log([m.itl_ms for m in unique])
    log_ttft = np.log([m.ttft_ms for m in unique])
    groups = [groups_of(w) for w in words]

    itl_columns = _itl_columns(unique)
    itl = fit_efficiency(ITL_PRIORS, itl_columns, log_itl, groups)
    support = points.take(choose_support(KERNEL, points, support_count))
    itl_residual = fit_residual(KERNEL, NOISE, points, log_itl - _log_times(itl, itl_columns, groups), support)

    ttft_columns = _ttft_columns(unique)
    ttft = fit_efficiency(TTFT_PRIORS, ttft_columns, log_ttft, groups)
    prefill_points = Points(points.categories, _prefill_quantities(unique))
    wider = tuple(replace(component, scale=component.scale * TTFT_FACTOR) for component in KERNEL)
    ttft_left = log_ttft - _log_times(ttft, ttft_columns, groups)
    ttft_fitted = fit_residual(wider, NOISE * TTFT_FACTOR, prefill_points, ttft_left, support)
    return Calibration(
        itl=itl,
        ttft=ttft,
        itl_residual=itl_residual,
        ttft_residual=itl_residual.scaled(TTFT_FACTOR, ttft_fitted.whitened_weights),
        vocabularies=vocabularies,
        measured=frozenset((m.setting.backend, m.setting.model_key, m.setting.accelerator.name, m.setting.serving.value) for m in unique),
        interval_scale={},
        versions=_usual_versions(unique),
        generations=frozenset((m.setting.backend, m.setting.accelerator.generation) for m in unique),
    )


@dataclass(frozen=True, slots=True)
class CrossValidation:
    """Predictions of each measurement by calibrations that have not seen it, nor anything else of its …"""

    configuration: list[Prediction]  # whole configurations held out: what rows differ in but load
    deployment: list[Prediction]  # whole deployments: sequence lengths too
    pair: list[Prediction]  # all of a model on an accelerator
    generation: list[Prediction]  # all of an architecture generation; empty if the measurements know only one

    def figures(self) -> dict[str, dict[str, float]]:
        """Of each way; coverage of intervals whose scale was chosen on the other half of the measurements."""
        ways = {"configuration": self.configuration, "deployment": self.deployment, "pair": self.pair, "generation": self.generation}
        return {name: errors(predictions) | coverage_of_halves(predictions) for name, predictions in ways.items() if predictions}


def cross_validated(measurements: Sequence[Measurement], on_progress: Progress = lambda _: None) -> tuple[Calibration, CrossValidation]:
    """A calibration of all, with intervals scaled to what cross-validation found, and those findings.

    Cost: some 40 calibrations: two minutes of CPU for 2,600 measurements.
    """
    identities = [m.identity for m in measurements]
    generations = _numbered([m.setting.accelerator.generation for m in measurements])
    found = CrossValidation(
        _held_out(
            measurements, held_out_folds([m.configuration for m in measurements], identities, FOLD_COUNT), on_progress, "configurations"
        ),
        _held_out(measurements, held_out_folds([m.deployment for m in measurements], identities, FOLD_COUNT), on_progress, "deployments"),
        _held_out(measurements, _numbered([(m.setting.model_key, m.setting.accelerator.name) for m in measurements]), on_progress, "pairs"),
        _held_out(measurements, generations, on_progress, "generations") if len(set(generations)) > 1 else [],
    )
    on_progress("all measurements")
    return replace(calibrate(measurements), interval_scale=_interval_scale(found)), found


def _interval_scale(found: CrossValidation) -> dict[str, float]:
    scale = {}
    for quantity in ("itl", "ttft", "tput"):
        pair, near, far = (quantile_scale(p, quantity, 0.8) for p in (found.configuration, found.pair, found.generation or found.pair))
        scale[f"{quantity}/{Basis.PAIR.name}"] = round(pair, 3)
        scale[f"{quantity}/{Basis.NEAR.name}"] = round(near, 3)
        scale[f"{quantity}/{Basis.ROOFLINE.name}"] = round(_STRANGER * max(near, far), 3)
    return scale


def _held_out(measurements: Sequence[Measurement], folds: Sequence[int], on_progress: Progress, what: str) -> list[Prediction]:
    """For each measurement the prediction of a calibration that has seen no measurement of its fold."""
    found: dict[int, Prediction] = {}
    for number, fold in enumerate(sorted(set(folds))):
        on_progress(f"{what}, {number + 1} of {len(set(folds))}")
        inside = [m for m, f in zip(measurements, folds, strict=True) if f != fold]
        places = [place for place, f in enumerate(folds) if f == fold]
        fitted = calibrate(inside)
        found |= dict(zip(places, predict(fitted, [measurements[place] for place in places]), strict=True))
    return [found[place] for place in range(len(measurements))]


def held_out_folds(keys: Sequence[Hashable], identities: Sequence[Hashable], count: int) -> list[int]:
    """A fold for each row, the same for rows of one key and for keys that share a measurement. By a hash of the key, so always the same
    folds.
    """
    parent: dict[Hashable, Hashable] = {}

    def root(key: Hashable) -> Hashable:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    first: dict[Hashable, Hashable] = {}
    for key, identity in zip(keys, identities, strict=True):
        parent[root(key)] = root(first.setdefault(identity, key))
    roots = [repr(root(key)) for key in keys]
    shuffled = sorted(set(roots), key=lambda text: hashlib.sha256(text.encode()).digest())
    place = {text: number % count for number, text in enumerate(shuffled)}
    return [place[text] for text in roots]


def _numbered(keys: Sequence[Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _usual_versions(measurements: Iterable[Measurement]) -> dict[str, str]:
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for m in measurements:
        version = m.setting.version or ""
        seen[f"{m.setting.backend}/{m.setting.model_key}/{m.setting.accelerator.name}"][version] += 1
        if version:
            seen[m.setting.backend][version] += 1
    return {key: counts.most_common(1)[0][0] for key, counts in sorted(seen.items())}


def _log_times(efficiency: Efficiency, columns: Floats, groups: Sequence[tuple[str, ...]]) -> Floats:
    known: Mapping[tuple[str, ...], Floats] = {group: efficiency.weights(group) for group in set(groups)}
    return np.asarray(np.log(np.einsum("nj,nj->n", columns, np.array([known[group] for group in groups]))))


def _itl_columns(measurements: Sequence[Measurement]) -> Floats:
    return _by_row(
        measurements,
        lambda m: itl_terms(m.setting, _one(m.mapping), _a(m.batch), Traffic(m.isl, m.osl)),
    )


def _ttft_columns(measurements: Sequence[Measurement]) -> Floats:
    """With the measured ITL: what TTFT depends on, not how well it is predicted."""
    return _by_row(
        measurements,
        lambda m: ttft_terms(m.setting, _one(m.prefill_mapping), _a(m.waiting), _a(m.concurrency), _a(m.itl_ms), Traffic(m.isl, m.osl)),
    )


def _by_row(measurements: Sequence[Measurement], columns: Callable[[Measurement], Floats]) -> Floats:
    return np.concatenate([columns(m) for m in measurements])


def _one(mapping: ParallelMapping) -> Mappings:
    return Mappings.of([mapping])


def _a(value: float) -> Floats:
    return np.array([float(value)])


def _quantities(measurements: Sequence[Measurement]) -> Floats:
    m = measurements
    return quantities_of(Mappings.of(x.mapping for x in m), np.array([x.batch for x in m]), *_lengths(m))


def _prefill_quantities(measurements: Sequence[Measurement]) -> Floats:
    m = measurements
    return quantities_of(Mappings.of(x.prefill_mapping for x in m), np.array([x.waiting for x in m]), *_lengths(m))


def _lengths(measurements: Sequence[Measurement]) -> tuple[Floats, Floats]:
    return np.array([float(m.isl) for m in measurements]), np.array([float(m.osl) for m in measurements])
