"""What fits: weights, cache and working room of one engine's accelerators."""

from __future__ import annotations

import numpy as np

from polyphase.advisor.accelerators import Accelerator
from polyphase.advisor.counts import kv_bytes_of_sequence
from polyphase.advisor.mapping import Floats, Mappings, ParallelMapping, kv_heads_share
from polyphase.advisor.precision import FORMATS, Precision
from polyphase.advisor.shapes import ModelShape

USABLE = 0.90  # of the memory; engines leave the rest to the driver and to others (vLLM's gpu_memory_utilization)
WORKING_BYTES = 3e9  # activations of a prefill chunk, captured graphs, communication buffers


def weight_bytes(shape: ModelShape, precision: Precision, m: Mappings) -> Floats:
    """float64[n], on each accelerator. Embedding and output layer in 16 bits."""
    tables = (shape.output_parameters + shape.embedding_parameters) * FORMATS["bf16"].bytes_per_weight
    dense = (shape.dense_parameters - shape.output_parameters) * precision.gemm.bytes_per_weight
    routed = shape.routed_parameters * precision.experts.bytes_per_weight
    return ((dense + tables) / m.tp + routed / (m.moe_tp * m.moe_ep)) / m.pp


def sequence_bytes(shape: ModelShape, precision: Precision, m: Mappings, tokens: float) -> Floats:
    """float64[n]: cache of one sequence of `tokens`, on each accelerator that holds a share of it."""
    return kv_bytes_of_sequence(shape, precision, tokens) * kv_heads_share(shape, m.tp) / m.pp


def batch_limit(shape: ModelShape, accelerator: Accelerator, precision: Precision, m: Mappings, tokens: float) -> Floats:
    """float64[n]: sequences of `tokens` for which each data parallel rank has room; 0 where the model does not fit at all."""
    left = accelerator.memory_bytes * USABLE - WORKING_BYTES - weight_bytes(shape, precision, m)
    return np.floor(np.maximum(left, 0.0) / sequence_bytes(shape, precision, m, tokens))


def missing_bytes(shape: ModelShape, accelerator: Accelerator, precision: Precision, mapping: ParallelMapping, tokens: float) -> float:
    """What each accelerator lacks to hold the model and one sequence; 0 or less if it fits."""
    m = Mappings.of([mapping])
    need = weight_bytes(shape, precision, m) + sequence_bytes(shape, precision, m, tokens) + WORKING_BYTES
    return float(need[0] - accelerator.memory_bytes * USABLE)
