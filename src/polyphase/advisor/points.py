"""Many candidate deployments as columns, and what is computed from their times for all of them at once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray

from polyphase.advisor.deployment import Traffic
from polyphase.advisor.goal import Goal
from polyphase.advisor.mapping import Bools, Floats

Index = NDArray[np.intp]
NO_PREFILL = -1


@dataclass(frozen=True, slots=True)
class Candidates:
    """All arrays [n]. `decode`, `prefill`: which engine (an index into the search's engines); prefill is NO_PREFILL where one engine does
    both.

    One unit is `decode_workers` and `prefill_workers`, `units` of them run side by side; times and `concurrency` are of one unit.
    """

    decode: Index
    prefill: Index
    decode_workers: Floats
    prefill_workers: Floats
    units: Floats
    batch: Floats  # per data parallel rank
    concurrency: Floats
    ttft_ms: Floats
    itl_ms: Floats
    gpu_count: Floats  # of all units
    pool_gpus: Floats  # of the fleet's pools that they are on, those left idle too
    power_kw: Floats
    dollars_per_hour: Floats

    def __len__(self) -> int:
        return len(self.decode)

    def take(self, index: Index | Bools) -> Self:
        return type(self)(*(getattr(self, entry.name)[index] for entry in fields(self)))

    @classmethod
    def joined(cls, parts: list[Self]) -> Self:
        return cls(*(np.concatenate([getattr(part, entry.name) for part in parts]) for entry in fields(cls)))

    def latency_ms(self, traffic: Traffic) -> Floats:
        return self.ttft_ms + self.itl_ms * max(traffic.osl - 1, 0)

    def requests_per_s(self, traffic: Traffic) -> Floats:
        """Of all units."""
        return self.units * self.concurrency / self.latency_ms(traffic) * 1e3

    def tok_s_per_gpu(self, traffic: Traffic) -> Floats:
        return self.requests_per_s(traffic) * traffic.osl / self.gpu_count

    def tok_s_per_fleet_gpu(self, traffic: Traffic) -> Floats:
        """What counts when the fleet is there anyway: accelerators that no unit fits on any more are not free."""
        return self.requests_per_s(traffic) * traffic.osl / self.pool_gpus

    def tok_s_per_user(self) -> Floats:
        return 1e3 / self.itl_ms

    def tok_s_per_mw(self, traffic: Traffic) -> Floats:
        return self.requests_per_s(traffic) * traffic.osl / self.power_kw * 1e3

    def excess(self, goal: Goal, traffic: Traffic) -> dict[str, Floats]:
        """By bound, the factor by which each candidate exceeds it: at most 1 is kept."""
        found: dict[str, Floats] = {}
        if goal.ttft_ms is not None:
            found["ttft_ms"] = self.ttft_ms / goal.ttft_ms
        if goal.itl_ms is not None:
            found["itl_ms"] = self.itl_ms / goal.itl_ms
        if goal.tok_s_per_user is not None:
            found["tok_s_per_user"] = goal.tok_s_per_user / self.tok_s_per_user()
        if goal.latency_ms is not None:
            found["latency_ms"] = self.latency_ms(traffic) / goal.latency_ms
        if goal.power_kw is not None:
            found["power_kw"] = self.power_kw / goal.power_kw
        if goal.dollars_per_hour is not None:
            found["dollars_per_hour"] = self.dollars_per_hour / goal.dollars_per_hour
        return found


def worst_excess(excess: dict[str, Floats], count: int) -> Floats:
    """float64[n]: the factor of the bound that is exceeded most; 0 without bounds."""
    return np.maximum.reduce(list(excess.values())) if excess else np.zeros(count)


def pareto(*larger_is_better: Floats) -> Index:
    """Indices of the candidates that no other beats in one respect without being beaten in another, best in the first respect first.

    Of equals one stays. Cost: O(n log n) for two respects, O(n · frontier) for more.
    """
    rest = larger_is_better[1:]
    order = np.lexsort([-column for column in reversed(larger_is_better)])
    if len(rest) == 1:
        second = rest[0][order]
        best_before = np.concatenate([[-np.inf], np.maximum.accumulate(second)[:-1]])
        return np.asarray(order[second > best_before])
    kept: list[int] = []
    matrix = np.stack(larger_is_better, axis=1)
    front = np.empty((0, matrix.shape[1]))
    for index in order:
        if len(front) and bool((front >= matrix[index]).all(axis=1).any()):
            continue
        kept.append(int(index))
        front = np.concatenate([front, matrix[index][None, :]])
    return np.array(kept, dtype=np.intp)
