"""How far behind nominal peaks real engines stay: a weight for each term, and how it is learned from measurements.

    log time = log Σ_j terms_j · exp(θ_j + δ_j[backend] + δ_j[generation] + δ_j[model] + …)

θ has a log-normal prior around a physical value, the deviations δ priors around zero. So weights are positive, a backend without
measurements gets the average one, and what the measurements cannot tell apart stays where physics puts it (with plain least squares, the
weights of mixtures range from 0 to 11). Fitted by Gauss-Newton steps, with Student's t for the noise, because a few measurements are of
something else than they say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
# Of the deviations: backend, generation, both, model, precision, backend with version, accelerator.
GROUP_SPREADS = (0.3, 0.25, 0.15, 0.15, 0.15, 0.15, 0.1)
_FREEDOM = 4.0  # degrees of freedom of the noise
_LONGEST_STEP = 1.0
_STEPS = 25
_CONJUGATE_STEPS = 60


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Logarithms of the weights. `deviations`: group (`vllm`, `hopper`, `vllm/hopper`) to one number per term."""

    names: tuple[str, ...]
    log_weights: Floats
    deviations: Mapping[str, Floats]

    def weights(self, groups: Iterable[str]) -> Floats:
        """float64[len(names)], of a setting's groups."""
        total = self.log_weights.copy()
        for group in groups:
            if group in self.deviations:
                total += self.deviations[group]
        return np.asarray(np.exp(total))


def prior_efficiency(priors: Mapping[str, tuple[float, float]]) -> Efficiency:
    """What there is without any measurement."""
    return Efficiency(tuple(priors), np.log([weight for weight, _ in priors.values()]), {})


def fit_efficiency(
    priors: Mapping[str, tuple[float, float]], terms: Floats, log_times: Floats, groups: Sequence[Sequence[str]]
) -> Efficiency:
    """Maximum a posteriori. `terms`: float64[n, J] in the order of `priors`; `log_times`: float64[n]; `groups`: of each row.

    Cost: O(n · J · groups) a step: below a second for 2,000 rows.
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
    prior = 1 / spread**2
    for _ in range(_STEPS):
        parts = np.exp(member @ theta.T) * terms
        total = parts.sum(axis=1)
        residual = log_times - np.log(total)
        scale = max(1.48 * float(np.median(np.abs(residual))), 0.03)
        trust = (_FREEDOM + 1) / (_FREEDOM + (residual / scale) ** 2) / scale**2
        step = _newton_step(parts / total[:, None], member, trust, residual, prior, theta - mean)
        longest = float(np.abs(step).max())
        theta = theta + step * min(1.0, _LONGEST_STEP / longest if longest else 1.0)
        if longest < 3e-3:
            break
    return theta


def _newton_step(share: Floats, member: Floats, trust: Floats, residual: Floats, prior: Floats, gone: Floats) -> Floats:
    """By conjugate gradients: the Jacobian is share ⊗ member, row by row, and is never written down."""

    def curvature(v: Floats) -> Floats:
        along = np.einsum("nj,nj->n", share, member @ v.T)
        return np.asarray((share * (trust * along)[:, None]).T @ member + prior * v)

    left = (share * (trust * residual)[:, None]).T @ member - prior * gone
    scale = 1 / ((share**2 * trust[:, None]).T @ member**2 + prior)
    step = np.zeros_like(left)
    direction = scaled = scale * left
    size = start = float(np.vdot(left, scaled))
    for _ in range(_CONJUGATE_STEPS):
        if size <= 1e-6 * start:
            break
        bent = curvature(direction)
        length = size / float(np.vdot(direction, bent))
        step += length * direction
        left = left - length * bent
        scaled = scale * left
        before, size = size, float(np.vdot(left, scaled))
        direction = scaled + size / before * direction
    return step
