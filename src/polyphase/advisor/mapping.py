"""How a model is spread over the accelerators of one engine, for one mapping or for thousands at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polyphase.advisor.shapes import AttentionKind, ModelShape

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, order=True)
class ParallelMapping:
    """Attention: `tp` accelerators share a sequence, `dp` groups hold sequences of their own. Experts: the same `tp * dp` accelerators,
    each expert over `moe_tp` of them, the experts over `moe_ep` groups. `pp` such stages one after another.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    moe_tp: int = 1
    moe_ep: int = 1

    @property
    def gpu_count(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        parts = [f"TP{self.tp}"]
        if self.dp > 1:
            parts.append(f"DP{self.dp}")
        if self.moe_ep > 1:
            parts.append(f"EP{self.moe_ep}")
        if self.moe_tp > 1 and self.moe_ep > 1:
            parts.append(f"MoE-TP{self.moe_tp}")
        if self.pp > 1:
            parts.append(f"PP{self.pp}")
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class Mappings:
    """Many mappings as columns, each float64[n]: floats, because they divide."""

    tp: Floats
    pp: Floats
    dp: Floats
    moe_tp: Floats
    moe_ep: Floats

    @classmethod
    def of(cls, mappings: Iterable[ParallelMapping]) -> Mappings:
        table = np.array([(m.tp, m.pp, m.dp, m.moe_tp, m.moe_ep) for m in mappings], dtype=np.float64).reshape(-1, 5)
        return cls(*np.ascontiguousarray(table.T))

    def __len__(self) -> int:
        return len(self.tp)

    @property
    def gpu_count(self) -> Floats:
        return self.tp * self.pp * self.dp

    def take(self, index: NDArray[np.intp]) -> Mappings:
        return Mappings(self.tp[index], self.pp[index], self.dp[index], self.moe_tp[index], self.moe_ep[index])


def mappings_of(shape: ModelShape, max_gpus: int, *, with_pipeline: bool = True, backend: str = "") -> list[ParallelMapping]:
    """Every mapping that engines can run on at most `max_gpus`, smallest first. `backend`: the engine, of which vLLM spreads experts over
    all of its accelerators or none.

    Query heads divide by tp; a pipeline stage holds a whole number of layers; experts divide by moe_ep, and expert columns by moe_tp. Data
    parallel attention is for mixtures: a dense model's replicas are engines of their own.
    """
    found = []
    for tp in _divisors(shape.attention.query_head_count, max_gpus):
        for pp in _divisors(shape.layer_count, max_gpus // tp) if with_pipeline else [1]:
            if pp > 8:
                continue
            if not shape.experts:
                found.append(ParallelMapping(tp, pp, 1, 1, 1))
                continue
            for dp in _group_sizes(max_gpus // (tp * pp)):
                world = tp * dp
                for moe_ep in _divisors(shape.experts.expert_count, world):
                    if world % moe_ep or (backend == "vllm" and moe_ep not in (1, world)):
                        continue
                    moe_tp = world // moe_ep
                    if moe_tp > 16 or shape.experts.intermediate_size % moe_tp or (dp > 1 and tp > 8):
                        continue
                    found.append(ParallelMapping(tp, pp, dp, moe_tp, moe_ep))
    return sorted(found, key=lambda m: (m.gpu_count, m))


def _divisors(number: int, limit: int) -> list[int]:
    return [n for n in range(1, min(number, limit) + 1) if number % n == 0]


def _group_sizes(limit: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, … 64, 72, 96 …: powers of two and three times them, as machines come, and eights of whole racks."""
    sizes = {2**n for n in range(10)} | {3 * 2**n for n in range(9)} | {9 * 2**n for n in range(7)}
    return sorted(size for size in sizes if size <= limit)


def kv_heads_share(shape: ModelShape, tp: Floats) -> Floats:
    """Part of a token's cache that one accelerator holds: heads divide as far as there are any, latent vectors not at all."""
    if shape.attention.kind is AttentionKind.LATENT:
        return np.ones_like(tp)
    return 1.0 / np.minimum(tp, shape.attention.kv_head_count)
