"""How far behind nominal peaks real engines stay: a weight for each term, and how it is learned from measurements.

    log time = log Σ_j terms_j · exp(θ_j + δ_j[backend] + δ_j[generation] + δ_j[backend, generation])

θ has a log-normal prior around a physical value, the deviations δ priors around zero. So weights are positive, a backend without measurements
gets the average one, and what the measurements cannot tell apart stays where physics puts it (with plain least squares, the weights of mixtures
range from 0 to 11). Fitted by Gauss-Newton steps, with Student's t for the noise, because a few measurements are of something else than they say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from polyphase.advisor.mapping import Floats

# Term: (weight, standard deviation of its logarithm). Latencies in µs a unit. Sources: fits to dense models on Hopper (BLIS: weights 1.36,
# KV 1.95, 32 µs a layer, 4.4 µs a request); collectives and exchanges far from peak at decode sizes.
ITL_PRIORS: Mapping[str, tuple[float, float]] = {
    "weights": (1.3, 0.3),
    "experts": (1.4, 0.4),
    "attention": (1.8, 0.5),
    "flops": (1.2, 0.5),
    "expert_flops": (1.5, 0.5),
    "reduce": (3.0, 0.8),
    "exchange": (3.0, 0.8),
    "layers": (25.0, 0.6),
    "expert_layers": (50.0, 0.8),
    "collectives": (4.0, 0.7),
    "rows": (8.0, 0.8),
    "step": (500.0, 1.0),
    "unpack": (0.5, 0.8),
    "beside_flops": (1.5, 0.5),
    "beside_attention": (2.5, 0.6),
    "beside_comm": (2.0, 0.8),
}
TTFT_PRIORS: Mapping[str, tuple[float, float]] = {
    "flops": (1.5, 0.5),
    "attention": (2.0, 0.6),
    "comm": (2.0, 0.8),
    "weights": (1.0, 0.6),
    "layers": (50.0, 0.7),
    "burst": (0.7, 1.0),
    "queue": (1.0, 1.0),
    "step_shared": (1.0, 0.7),
    "step_own": (1.0, 0.7),
    "request": (15.0, 0.8),
    "tokens": (3.0, 1.0),
    "concurrency": (0.3, 1.2),
    "transfer": (2.0, 1.0),
}
GROUP_SPREADS = (0.3, 0.25, 0.15)  # of the deviations: backend, generation, both together
_FREEDOM = 4.0  # degrees of freedom of the noise
_LONGEST_STEP = 1.0
_STEPS = 25


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Logarithms of the weights. `deviations`: group (`vllm`, `hopper`, `vllm/hopper`) to one number per term."""

    names: tuple[str, ...]
    log_weights: Floats
    deviations: Mapping[str, Floats]

    def weights(self, backend: str, generation: str) -> Floats:
        """float64[len(names)]."""
        total = self.log_weights.copy()
        for group in groups_of(backend, generation):
            if group in self.deviations:
                total += self.deviations[group]
        return np.asarray(np.exp(total))


def groups_of(backend: str, generation: str) -> tuple[str, str, str]:
    return backend, generation, f"{backend}/{generation}"


def prior_efficiency(priors: Mapping[str, tuple[float, float]]) -> Efficiency:
    """What there is without any measurement."""
    return Efficiency(tuple(priors), np.log([weight for weight, _ in priors.values()]), {})


def fit_efficiency(
    priors: Mapping[str, tuple[float, float]], terms: Floats, log_times: Floats, groups: Sequence[tuple[str, str, str]]
) -> Efficiency:
    """Maximum a posteriori. `terms`: float64[n, J] in the order of `priors`; `log_times`: float64[n]; `groups`: of each row.

    Cost: O(n · p²) a step, p = J times the number of groups: a second for 2,000 rows.
    """
    names = tuple(priors)
    columns = sorted({(level, group) for row in groups for level, group in enumerate(row)})
    index = {key: 1 + number for number, key in enumerate(columns)}
    member = np.zeros((len(log_times), 1 + len(columns)))
    member[:, 0] = 1.0
    for number, row in enumerate(groups):
        for level, group in enumerate(row):
            member[number, index[level, group]] = 1.0
    mean = np.zeros((len(names), 1 + len(columns)))
    mean[:, 0] = np.log([priors[name][0] for name in names])
    spread = np.ones_like(mean)
    spread[:, 0] = [priors[name][1] for name in names]
    spread[:, 1:] = [GROUP_SPREADS[level] for level, _ in columns]
    theta = _posterior_mode(terms, log_times, member, mean, spread)
    return Efficiency(names, theta[:, 0], {group: theta[:, index[level, group]] for level, group in columns})


def _posterior_mode(terms: Floats, log_times: Floats, member: Floats, mean: Floats, spread: Floats) -> Floats:
    theta = mean.copy()
    count, (rows, columns) = len(log_times), theta.shape
    for _ in range(_STEPS):
        parts = np.exp(member @ theta.T) * terms
        total = parts.sum(axis=1)
        residual = log_times - np.log(total)
        scale = max(1.48 * float(np.median(np.abs(residual))), 0.03)
        trust = (_FREEDOM + 1) / (_FREEDOM + (residual / scale) ** 2) / scale**2
        share = parts / total[:, None]
        jacobian = (share[:, :, None] * member[:, None, :]).reshape(count, rows * columns)
        curvature = jacobian.T @ (jacobian * trust[:, None]) + np.diag(1 / spread.ravel() ** 2)
        slope = jacobian.T @ (trust * residual) - ((theta - mean) / spread**2).ravel()
        step = np.linalg.solve(curvature, slope).reshape(rows, columns)
        longest = float(np.abs(step).max())
        theta = theta + step * min(1.0, _LONGEST_STEP / longest if longest else 1.0)
        if longest < 1e-3:
            break
    return theta
