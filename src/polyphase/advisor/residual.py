"""What the roofline gets wrong, learned where something was measured and forgotten where nothing was.

A Gaussian process over log(measured / roofline). Its kernel is a sum of products: each category that differs (backend, model, …)
multiplies the similarity by a factor below one, each quantity (batch, lengths, mapping) lowers it with the distance of its logarithms.
Far from measurements the mean goes to zero, so that the roofline stands alone, and the variance to the kernel's.

Sparse: `support` points, chosen greedily where the variance was largest, carry everything (deterministic training conditional).
Because the kernel is a product, the mean for a whole grid of mappings by batches is one matrix product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from polyphase.advisor.mapping import Floats, Mappings

Ints = NDArray[np.int64]
CATEGORIES = ("backend", "generation", "accelerator", "model", "precision", "serving", "version")
QUANTITIES = ("batch", "isl", "osl", "tp", "dp", "ep")
UNSEEN = -1
_FREEDOM = 4.0
_ROUNDS = 4
_JITTER = 1e-6


@dataclass(frozen=True, slots=True)
class Component:
    """One product of the kernel: `scale` is the standard deviation of what it explains, factors and lengths in the orders above."""

    scale: float
    factors: tuple[float, ...]
    lengths: tuple[float, ...]  # in doublings


@dataclass(frozen=True, slots=True)
class Points:
    """categories: int64[n, len(CATEGORIES)], UNSEEN differs from everything; quantities: float64[n, len(QUANTITIES)], base-2 logarithms."""

    categories: Ints
    quantities: Floats

    def __len__(self) -> int:
        return len(self.categories)

    def take(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> Points:
        return Points(self.categories[index], self.quantities[index])


def quantities_of(mappings: Mappings, batch: Floats, isl: Floats, osl: Floats) -> Floats:
    """float64[n, len(QUANTITIES)]."""
    columns = (np.maximum(batch, 0.5), isl, osl, mappings.tp, mappings.dp, mappings.moe_ep)
    return np.asarray(np.log2(np.stack(np.broadcast_arrays(*columns), axis=1)))


def kernel(components: Sequence[Component], a: Points, b: Points) -> Floats:
    """float64[len(a), len(b)]."""
    differs = a.categories[:, None, :] != b.categories[None, :, :]
    differs |= (a.categories == UNSEEN)[:, None, :]
    apart = (a.quantities[:, None, :] - b.quantities[None, :, :]) ** 2
    total = np.zeros((len(a), len(b)))
    for component in components:
        exponent = differs @ np.log(component.factors) - 0.5 * apart @ (1 / np.square(component.lengths))
        total += component.scale**2 * np.exp(exponent)
    return total


def prior_variance(components: Sequence[Component]) -> float:
    return float(sum(component.scale**2 for component in components))


@dataclass(frozen=True, eq=False)
class Residual:
    """A fitted process. What is stored is whitened by the Cholesky factor of the support's kernel, so that it survives 32-bit floats.

    whitened_weights: float64[m]; certainty: float64[m, m], symmetric with eigenvalues in [0, 1]: 0 where nothing was learned.
    """

    components: tuple[Component, ...]
    support: Points
    whitened_weights: Floats
    certainty: Floats
    noise: float

    @cached_property
    def _unwhiten(self) -> Floats:
        return np.asarray(np.linalg.inv(_factor(self.components, self.support)).T) if len(self.support) else np.zeros((0, 0))

    @cached_property
    def _weights(self) -> Floats:
        return self._unwhiten @ self.whitened_weights

    @cached_property
    def _shrink(self) -> Floats:
        return self._unwhiten @ self.certainty @ self._unwhiten.T

    @cached_property
    def _strengths(self) -> dict[bytes, Floats]:
        return {}

    @cached_property
    def _batches(self) -> dict[bytes, list[Floats]]:
        return {}

    def _strength(self, categories: Ints) -> Floats:
        """float64[components, m]: the kernel's part that only depends on a setting's categories; remembered, settings are few."""
        key = categories.tobytes()
        if key not in self._strengths:
            differs = (self.support.categories != categories) | (categories == UNSEEN)
            self._strengths[key] = np.stack([c.scale**2 * np.exp(differs @ np.log(c.factors)) for c in self.components])
        return self._strengths[key]

    def deviation(self, categories: Ints, quantities: Floats) -> Floats:
        """float64[n]: standard deviation of a new measurement's logarithm. quantities: float64[n, len(QUANTITIES)] of one setting."""
        apart = (quantities[:, None, :] - self.support.quantities[None, :, :]) ** 2
        cross = np.zeros((len(quantities), len(self.support)))
        for component, strength in zip(self.components, self._strength(categories), strict=True):
            cross += strength * np.exp(apart @ (-0.5 / np.square(component.lengths)))
        taken = np.einsum("nm,nm->n", cross @ self._shrink, cross)
        return np.asarray(np.sqrt(np.maximum(prior_variance(self.components) - taken, 0.0) + self.noise**2))

    def grid_mean(self, categories: Ints, rows: Floats, columns: Floats) -> Floats:
        """float64[r, c] of one setting, to be added to the logarithm of the roofline's time. `rows`: float64[r, 5] hold all quantities but
        the first; `columns`: float64[c] the first, the batch.
        """
        total = np.zeros((len(rows), len(columns)))
        across = (rows[:, None, :] - self.support.quantities[None, :, 1:]) ** 2
        for component, strength, along in zip(self.components, self._strength(categories), self._along(columns), strict=True):
            narrow = -0.5 / np.square(component.lengths[1:])
            total += (np.exp(across @ narrow) * (strength * self._weights)) @ along
        return total

    def _along(self, columns: Floats) -> list[Floats]:
        """float64[m, c] for each component: the kernel's part over the batch; remembered, everybody asks for one grid."""
        key = columns.tobytes()
        if key not in self._batches:
            apart = (self.support.quantities[:, 0, None] - columns) ** 2
            self._batches[key] = [np.exp(apart * (-0.5 / component.lengths[0] ** 2)) for component in self.components]
        return self._batches[key]

    def scaled(self, factor: float, whitened_weights: Floats) -> Residual:
        """The same kernel for another quantity, whose logarithm strays `factor` times as far."""
        components = tuple(Component(c.scale * factor, c.factors, c.lengths) for c in self.components)
        return Residual(components, self.support, whitened_weights, self.certainty, self.noise * factor)


def _factor(components: Sequence[Component], support: Points) -> Floats:
    jitter = _JITTER * prior_variance(components)
    return np.asarray(np.linalg.cholesky(kernel(components, support, support) + jitter * np.eye(len(support))))


def no_residual() -> Residual:
    """The roofline alone, with a factor of about two of doubt either way at one standard deviation and a half."""
    nothing = Points(np.zeros((0, len(CATEGORIES)), np.int64), np.zeros((0, len(QUANTITIES))))
    wide = Component(0.45, (1.0,) * len(CATEGORIES), (1.0,) * len(QUANTITIES))
    return Residual((wide,), nothing, np.zeros(0), np.zeros((0, 0)), 0.05)


def choose_support(components: Sequence[Component], points: Points, count: int) -> Ints:
    """Indices of points, each where the variance left by those before it is largest: a pivoted Cholesky decomposition, cut short.

    Cost: O(n · count²).
    """
    count = min(count, len(points))
    left = np.full(len(points), prior_variance(components))
    rows = np.zeros((count, len(points)))
    chosen: list[int] = []
    for number in range(count):
        pivot = int(np.argmax(left))
        if left[pivot] < 1e-4 * prior_variance(components):
            break
        chosen.append(pivot)
        column = kernel(components, points.take(np.array([pivot])), points)[0] - rows[:number, pivot] @ rows[:number]
        rows[number] = column / np.sqrt(left[pivot])
        left = np.maximum(left - rows[number] ** 2, 0.0)
        left[pivot] = 0.0
    return np.array(chosen, dtype=np.int64)


def fit_residual(components: Sequence[Component], noise: float, points: Points, residuals: Floats, support: Points) -> Residual:
    """`residuals`: float64[n], logarithms. Measurements far from the others' tale get less weight, as under Student's t."""
    unwhiten = np.linalg.inv(_factor(components, support)).T
    cross = kernel(components, points, support) @ unwhiten
    trust: Floats = np.ones(len(points))
    weights: Floats = np.zeros(len(support))
    precision: Floats = np.eye(len(support))
    for _ in range(_ROUNDS):
        scaled = cross * (trust / noise**2)[:, None]
        precision = np.asarray(np.eye(len(support)) + cross.T @ scaled)
        weights = np.asarray(np.linalg.solve(precision, scaled.T @ residuals), dtype=np.float64)
        left = residuals - cross @ weights
        trust = np.maximum((_FREEDOM + 1) / (_FREEDOM + (left / noise) ** 2), 1e-3)
    certainty = np.eye(len(support)) - np.linalg.inv(precision)
    return Residual(tuple(components), support, weights, (certainty + certainty.T) / 2, noise)


def encode(vocabularies: Mapping[str, Sequence[str]], values: Mapping[str, str]) -> Ints:
    """int64[len(CATEGORIES)] of one setting's words; a word that was never measured is UNSEEN."""
    return np.array(
        [vocabularies[name].index(values[name]) if values[name] in vocabularies[name] else UNSEEN for name in CATEGORIES], dtype=np.int64
    )
