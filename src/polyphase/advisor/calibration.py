"""What was learned from measurements, as a value: weights, residuals, how wide intervals must be, and where it all came from. And its
file.
"""

from __future__ import annotations

import base64
import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from polyphase.advisor.deployment import Setting
from polyphase.advisor.efficiency import ITL_PRIORS, TTFT_PRIORS, Efficiency, prior_efficiency
from polyphase.advisor.mapping import Floats
from polyphase.advisor.residual import CATEGORIES, QUANTITIES, Component, Ints, Points, Residual, encode, no_residual
from polyphase.core.errors import ConfigurationError

FORMAT = "polyphase-calibration-1"


class Basis(enum.StrEnum):
    """What an estimate rests on, the best first."""

    PAIR = "fitted on this model, accelerator and engine"
    NEAR = "fitted on this engine and generation, not on this model there"
    ROOFLINE = "roofline with physical priors"


@dataclass(frozen=True, slots=True)
class Calibration:
    itl: Efficiency
    ttft: Efficiency
    itl_residual: Residual
    ttft_residual: Residual
    vocabularies: Mapping[str, Sequence[str]]
    measured: frozenset[tuple[str, str, str, str]]  # backend, model key, accelerator, serving
    interval_scale: Mapping[str, float]  # "itl/PAIR": by how much deviations are widened so that 80 % lie inside
    versions: Mapping[str, str] = field(default_factory=dict)  # "backend/model/accelerator" and "backend": the version measured most
    generations: frozenset[tuple[str, str]] = frozenset()  # backend, generation
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def basis(self, setting: Setting) -> Basis:
        if (setting.backend, setting.model_key, setting.accelerator.name, setting.serving.value) in self.measured:
            return Basis.PAIR
        if (setting.backend, setting.accelerator.generation) in self.generations:
            return Basis.NEAR
        return Basis.ROOFLINE

    def version_of(self, setting: Setting) -> str:
        """The engine's version that an estimate is for, where the question leaves it open."""
        if setting.version is not None:
            return setting.version
        pair = f"{setting.backend}/{setting.model_key}/{setting.accelerator.name}"
        return self.versions.get(pair, self.versions.get(setting.backend, ""))

    def weights(self, quantity: str, setting: Setting) -> Floats:
        """Of the terms of `itl` or `ttft`, in their order."""
        groups = groups_of(category_words(setting, self.version_of(setting)))
        return (self.itl if quantity == "itl" else self.ttft).weights(groups)

    def categories(self, setting: Setting) -> Ints:
        return encode(self.vocabularies, category_words(setting, self.version_of(setting)))

    def scale(self, quantity: str, basis: Basis) -> float:
        return self.interval_scale.get(f"{quantity}/{basis.name}", 1.0)


def category_words(setting: Setting, version: str) -> dict[str, str]:
    return {
        "backend": setting.backend,
        "generation": setting.accelerator.generation,
        "accelerator": setting.accelerator.name,
        "model": setting.model_key,
        "precision": setting.precision.name,
        "serving": setting.serving.value,
        "version": f"{setting.backend} {version}",
    }


def groups_of(words: Mapping[str, str]) -> tuple[str, ...]:
    """The groups whose deviations apply to a setting, in the order of `efficiency.GROUP_SPREADS`."""
    w = words
    pair = f"{w['backend']}/{w['generation']}"
    return w["backend"], w["generation"], pair, w["model"], w["precision"], w["version"], w["accelerator"]


def uncalibrated() -> Calibration:
    """The roofline with its priors, for a machine that nobody has measured anything on."""
    nothing: dict[str, list[str]] = {name: [] for name in CATEGORIES}
    return Calibration(prior_efficiency(ITL_PRIORS), prior_efficiency(TTFT_PRIORS), no_residual(), no_residual(), nothing, frozenset(), {})


def to_json(calibration: Calibration) -> str:
    c, residual = calibration, calibration.itl_residual
    content = {
        "format": FORMAT,
        "provenance": dict(c.provenance),
        "itl": _efficiency_out(c.itl),
        "ttft": _efficiency_out(c.ttft),
        "residual": {
            "components": [
                {
                    "scale": component.scale,
                    "factors": dict(zip(CATEGORIES, component.factors, strict=True)),
                    "lengths": dict(zip(QUANTITIES, component.lengths, strict=True)),
                }
                for component in residual.components
            ],
            "noise": residual.noise,
            "ttft_factor": c.ttft_residual.noise / residual.noise,
            "vocabularies": {name: list(words) for name, words in c.vocabularies.items()},
            "support_categories": residual.support.categories.tolist(),
            "support_quantities": np.round(residual.support.quantities, 3).tolist(),
            "itl_weights": _pack(residual.whitened_weights),
            "ttft_weights": _pack(c.ttft_residual.whitened_weights),
            "certainty": _pack(residual.certainty[np.triu_indices(len(residual.support))]),
        },
        "interval_scale": dict(c.interval_scale),
        "measured": sorted(map(list, c.measured)),
        "generations": sorted(map(list, c.generations)),
        "versions": dict(c.versions),
    }
    return "{\n" + ",\n".join(f'"{key}": {json.dumps(value)}' for key, value in content.items()) + "\n}\n"


def from_json(text: str, where: str) -> Calibration:
    """Raises: ConfigurationError if it is no calibration of this format."""
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ConfigurationError(f"{where} has the format {content['format']!r}; this version reads {FORMAT}. Calibrate anew.")
        return _from_content(content)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigurationError(f"{where} is no calibration: {type(error).__name__}: {error}") from None


def _from_content(content: Mapping[str, Any]) -> Calibration:
    stored = content["residual"]
    components = tuple(
        Component(part["scale"], tuple(part["factors"][n] for n in CATEGORIES), tuple(part["lengths"][n] for n in QUANTITIES))
        for part in stored["components"]
    )
    categories = np.array(stored["support_categories"], dtype=np.int64).reshape(-1, len(CATEGORIES))
    support = Points(categories, np.array(stored["support_quantities"], dtype=np.float64).reshape(-1, len(QUANTITIES)))
    certainty = np.zeros((len(support), len(support)))
    certainty[np.triu_indices(len(support))] = _unpack(stored["certainty"])
    certainty = certainty + np.triu(certainty, 1).T
    residual = Residual(components, support, _unpack(stored["itl_weights"]), certainty, stored["noise"])
    return Calibration(
        itl=_efficiency_in(content["itl"]),
        ttft=_efficiency_in(content["ttft"]),
        itl_residual=residual,
        ttft_residual=residual.scaled(stored["ttft_factor"], _unpack(stored["ttft_weights"])),
        vocabularies=stored["vocabularies"],
        measured=frozenset((b, m, a, s) for b, m, a, s in content["measured"]),
        interval_scale=content["interval_scale"],
        versions=content["versions"],
        generations=frozenset((b, g) for b, g in content["generations"]),
        provenance=content["provenance"],
    )


def _efficiency_out(efficiency: Efficiency) -> dict[str, Any]:
    """Weights as factors, which people can read."""
    named = dict(zip(efficiency.names, np.round(np.exp(efficiency.log_weights), 5).tolist(), strict=True))
    groups = {g: dict(zip(efficiency.names, np.round(np.exp(d), 4).tolist(), strict=True)) for g, d in efficiency.deviations.items()}
    return {"weights": named, "factors": groups}


def _efficiency_in(content: Mapping[str, Any]) -> Efficiency:
    names = tuple(content["weights"])
    return Efficiency(
        names,
        np.log(np.array(list(content["weights"].values()))),
        {group: np.log(np.array([factors[name] for name in names])) for group, factors in content["factors"].items()},
    )


def _pack(values: Floats) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _unpack(text: str) -> Floats:
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float64)
