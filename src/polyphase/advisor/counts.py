"""What one engine step computes, reads and sends, as times at the accelerator's nominal peaks.

Columns of DECODE_TERMS: one step that writes one token for each of `batch` sequences per data parallel rank.
Columns of PREFILL_TERMS: reading `new_tokens` of one prompt per rank, `cached_tokens` of it found in the cache.

No efficiency is in here: `calibration` knows how far behind these times real engines stay. Latencies are counts of things that take time
whatever their size, in milliseconds at one microsecond each. Everything is per accelerator, vectorised over mappings and batches; with
pipeline stages a token passes all of them, so layers are not divided, but each stage works on its part of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from polyphase.advisor.accelerators import Accelerator
from polyphase.advisor.mapping import Floats, Mappings, kv_heads_share
from polyphase.advisor.precision import FORMATS, Peak, Precision
from polyphase.advisor.shapes import ModelShape

DECODE_TERMS = (
    "weights",  # dense weights read
    "experts",  # expert weights touched, of the fullest rank
    "attention",  # KV read or attention computed, the slower
    "flops",  # dense products
    "expert_flops",
    "reduce",  # all-reduces, bytes
    "exchange",  # expert all-to-all, bytes
    "layers",  # latencies: layers,
    "expert_layers",  # layers with experts,
    "collectives",  # hops of collectives,
    "rows",  # sequences,
    "step",  # the step
    "unpack",  # weights in a format without arithmetic of its own, expanded to 16 bits
)
PREFILL_TERMS = ("flops", "expert_flops", "attention", "reduce", "exchange", "weights", "layers", "step")
_ACTIVATION_BYTES = 2.0
_US = 1e-3  # ms
_WIDER = {Peak.FP8: Peak.BF16, Peak.FP4: Peak.FP8}
_PREFILL_CHUNK = 8192.0  # tokens in one step; weights are read once each
_IMBALANCE = 1.0  # standard deviations by which the fullest rank leads, times sqrt(2 ln ranks)


def decode_terms(
    shape: ModelShape,
    accelerator: Accelerator,
    precision: Precision,
    mappings: Mappings,
    batch: Floats,
    context_tokens: float,
    tokens_per_row: float = 1.0,
) -> Floats:
    """float64[n, len(DECODE_TERMS)], ms. `batch`: float64[n], sequences per rank; each sees `context_tokens`.

    `tokens_per_row`: more than 1 where a step also checks drafted tokens: they are multiplied with the weights, and read the same cache.
    """
    m, memory = mappings, accelerator.memory_bytes_per_s
    rows = np.maximum(batch / m.pp, 1.0)  # of one pass through a stage
    tokens = rows * tokens_per_row
    columns = {
        "weights": _dense_bytes(shape, precision, m.tp) / memory,
        "attention": rows * _attention_s(shape, accelerator, precision, m, context_tokens),
        "flops": tokens * _dense_flops_s(shape, accelerator, precision, m.tp),
        "reduce": _reduce_s(shape, accelerator, m, tokens),
        "layers": np.full(len(m), shape.layer_count * _US / 1e3),
        "expert_layers": np.full(len(m), shape.expert_layer_count * _US / 1e3),
        "collectives": _collective_hops(shape, accelerator, m) * _US / 1e3,
        "rows": batch * _US / 1e3,
        "step": np.full(len(m), _US / 1e3),
    }
    if shape.experts:
        columns |= _expert_columns(shape, accelerator, precision, m, tokens)
        columns["exchange"] = _exchange_s(shape, accelerator, m, tokens)
    columns["unpack"] = _unpack_s(accelerator, precision, columns)
    zero = np.zeros(len(m))
    return np.stack([columns.get(name, zero) * 1e3 for name in DECODE_TERMS], axis=1)


def prefill_terms(
    shape: ModelShape, accelerator: Accelerator, precision: Precision, mappings: Mappings, new_tokens: float, cached_tokens: float
) -> Floats:
    """float64[n, len(PREFILL_TERMS)], ms, of one prompt on each rank at once, as under load."""
    m = mappings
    pairs = new_tokens * (cached_tokens + new_tokens / 2)
    full, windowed = shape.full_layer_count, shape.windowed_layer_count
    seen = full * pairs + windowed * new_tokens * np.minimum(shape.window_tokens, (cached_tokens + new_tokens / 2))
    if shape.attention.top_tokens:
        seen = full * new_tokens * np.minimum(shape.attention.top_tokens, cached_tokens + new_tokens / 2)
    flops = accelerator.peak(Peak.BF16)
    columns = {
        "flops": new_tokens * _dense_flops_s(shape, accelerator, precision, m.tp),
        "attention": seen * shape.attention.prefill_flops_per_pair / m.tp / flops,
        "reduce": _reduce_s(shape, accelerator, m, new_tokens),
        "weights": np.ceil(new_tokens / _PREFILL_CHUNK) * _dense_bytes(shape, precision, m.tp) / accelerator.memory_bytes_per_s,
        "layers": np.full(len(m), np.ceil(new_tokens / _PREFILL_CHUNK) * shape.layer_count * _US / 1e3),
        "step": np.full(len(m), _US / 1e3),
    }
    if shape.experts:
        routed = shape.expert_layer_count * shape.experts.active_count * shape.experts.parameter_count(shape.hidden_size)
        columns["expert_flops"] = 2 * routed * new_tokens / m.tp / accelerator.peak(precision.experts.peak)
        columns["exchange"] = _exchange_s(shape, accelerator, m, new_tokens)
        touched = _touched_experts(shape, m, new_tokens * m.dp)
        expert_bytes = shape.experts.parameter_count(shape.hidden_size) * precision.experts.bytes_per_weight / m.moe_tp
        columns["weights"] = columns["weights"] + shape.expert_layer_count * touched * expert_bytes / accelerator.memory_bytes_per_s
    zero = np.zeros(len(m))
    return np.stack([columns.get(name, zero) * 1e3 for name in PREFILL_TERMS], axis=1)


def _dense_bytes(shape: ModelShape, precision: Precision, tp: Floats) -> Floats:
    body = (shape.dense_parameters - shape.output_parameters) * precision.gemm.bytes_per_weight
    return (body + shape.output_parameters * FORMATS["bf16"].bytes_per_weight) / tp


def _dense_flops_s(shape: ModelShape, accelerator: Accelerator, precision: Precision, tp: Floats) -> Floats:
    """Per token."""
    body = 2 * (shape.dense_parameters - shape.output_parameters) / accelerator.peak(precision.gemm.peak)
    return (body + 2 * shape.output_parameters / accelerator.peak(Peak.BF16)) / tp


def _attention_s(shape: ModelShape, accelerator: Accelerator, precision: Precision, m: Mappings, context: float) -> Floats:
    """Per sequence and step: reading the cache or computing on it, whichever is slower; linear layers read and write their state."""
    a = shape.attention
    seen = np.minimum(context, a.top_tokens) if a.top_tokens else context
    tokens = shape.full_layer_count * seen + shape.windowed_layer_count * np.minimum(context, shape.window_tokens)
    read = tokens * a.cached_numbers * precision.kv_bytes * kv_heads_share(shape, m.tp)
    read += shape.full_layer_count * context * a.index_dim  # one byte each
    if shape.linear:
        read = read + shape.linear_layer_count * shape.linear.state_numbers * 2 * _ACTIVATION_BYTES / m.tp
    computed = tokens * a.flops_per_pair / m.tp
    return np.asarray(np.maximum(read / accelerator.memory_bytes_per_s, computed / accelerator.peak(Peak.BF16)))


def _touched_experts(shape: ModelShape, m: Mappings, tokens: Floats) -> Floats:
    """Experts of one layer that the fullest rank reads, when `tokens` choose at random: expectation plus the spread over ranks."""
    assert shape.experts
    count, active = shape.experts.expert_count, shape.experts.active_count
    chance = 1.0 - (1.0 - active / count) ** tokens
    held = count / m.moe_ep
    spread = np.sqrt(2 * np.log(m.moe_ep) * held * chance * (1 - chance)) if count > 1 else 0.0
    return np.minimum(held, held * chance + _IMBALANCE * spread)


def _expert_columns(shape: ModelShape, accelerator: Accelerator, precision: Precision, m: Mappings, rows: Floats) -> dict[str, Floats]:
    assert shape.experts
    tokens = rows * m.dp
    expert = shape.experts.parameter_count(shape.hidden_size)
    layers = shape.expert_layer_count
    read = layers * _touched_experts(shape, m, tokens) * expert * precision.experts.bytes_per_weight / m.moe_tp
    chosen = tokens * shape.experts.active_count / m.moe_ep
    fullest = chosen + _IMBALANCE * np.sqrt(2 * np.log(m.moe_ep) * chosen)
    return {
        "experts": read / accelerator.memory_bytes_per_s,
        "expert_flops": layers * fullest * 2 * expert / m.moe_tp / accelerator.peak(precision.experts.peak),
    }


def _unpack_s(accelerator: Accelerator, precision: Precision, columns: Mapping[str, Floats]) -> Floats:
    """Time to move the 16-bit form of weights that must be expanded first: integers everywhere, fp4 and fp8 where they are not native."""
    total = np.zeros_like(columns["weights"])
    for name, form in (("weights", precision.gemm), ("experts", precision.experts)):
        is_native = form.peak is not Peak.BF16 and accelerator.peak(form.peak) > accelerator.peak(_WIDER[form.peak])
        if name in columns and form.bytes_per_weight < 2 and not is_native:
            total = total + columns[name] * 2 / form.bytes_per_weight
    return total


def _bandwidth(accelerator: Accelerator, ranks: Floats) -> Floats:
    """Bytes per second of the slowest link among `ranks` accelerators."""
    return np.where(ranks <= accelerator.domain_size, accelerator.link_bytes_per_s, accelerator.network_bytes_per_s)


def _reduce_s(shape: ModelShape, accelerator: Accelerator, m: Mappings, rows: Floats | float) -> Floats:
    """Two ring all-reduces a layer over tp: after attention, and after the feed-forward part unless that is an exchange."""
    per_layer = np.where(m.dp > 1, 1.0, 2.0)
    sent = 2 * (m.tp - 1) / m.tp * rows * shape.hidden_size * _ACTIVATION_BYTES
    return shape.layer_count * per_layer * sent / _bandwidth(accelerator, m.tp)


def _exchange_s(shape: ModelShape, accelerator: Accelerator, m: Mappings, rows: Floats | float) -> Floats:
    """Dispatch in one byte and combine in two, to the ranks that hold a token's experts; only where attention is data parallel."""
    assert shape.experts
    ranks = m.tp * m.dp
    copies = np.minimum(shape.experts.active_count, m.moe_ep) * m.moe_tp
    local = np.minimum(1.0, accelerator.domain_size / ranks)
    sent = rows / m.tp * shape.hidden_size * 3.0 * copies
    inside = local * (1 - 1 / ranks) / accelerator.link_bytes_per_s
    outside = (1 - local) / accelerator.network_bytes_per_s
    return np.where(m.dp > 1, shape.expert_layer_count * sent * (inside + outside), 0.0)


def _collective_hops(shape: ModelShape, accelerator: Accelerator, m: Mappings) -> Floats:
    """Collectives of a step times the logarithm of their ranks; threefold beyond the domain; one hand-over per pipeline stage."""
    reach = np.where(m.dp > 1, m.tp * m.dp, m.tp)
    far = np.where(reach > accelerator.domain_size, 3.0, 1.0)
    return 2 * shape.layer_count * np.log2(reach) * far + 4 * (m.pp - 1)


def kv_bytes_of_sequence(shape: ModelShape, precision: Precision, tokens: Floats | float) -> Floats:
    """Bytes that a sequence of `tokens` holds, before sharding: windowed layers at most their window, linear layers their state."""
    numbers = shape.attention.cached_numbers
    full = shape.full_layer_count * np.asarray(tokens, dtype=np.float64)
    windowed = shape.windowed_layer_count * np.minimum(tokens, shape.window_tokens)
    state = shape.linear_layer_count * shape.linear.state_numbers * _ACTIVATION_BYTES if shape.linear else 0.0
    return np.asarray((full + windowed) * numbers * precision.kv_bytes + full * shape.attention.index_dim + state)
