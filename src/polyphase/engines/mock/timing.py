"""How long a step takes on the imagined accelerator: a roofline over what the step's plan reads and computes.

  linear layers   the slower of reading all weights once and computing all tokens
+ attention       the slower of reading the KV that the rows see and computing it
+ what there is besides: for the step, for each layer, for each row
"""

from __future__ import annotations

from collections.abc import Iterable

from polyphase.engines.batching.scheduler import Pull, Row
from polyphase.engines.mock.shapes import Accelerator, ModelShape

# How far behind the nominal peaks real engines stay. Source: BLIS's and our own fits to measured serving of dense models with vLLM on
# Hopper (weights 1.36-1.44, KV 1.65-1.95, 30 µs a layer, 4.4 µs a request, 126 µs a step); prefill at about 65 % of the peak.
_WEIGHT_FACTOR = 1.4
_KV_FACTOR = 1.8
_FLOP_FACTOR = 1.5
_LAYER_S = 30e-6
_ROW_S = 4.4e-6
_STEP_S = 126e-6


class StepTimes:
    """Times of one model on one accelerator. `speedup` divides them all; infinite makes them zero."""

    def __init__(self, shape: ModelShape, accelerator: Accelerator, speedup: float = 1.0) -> None:
        self._scale = 1e9 / speedup
        self._weights_s = _WEIGHT_FACTOR * shape.weight_bytes / accelerator.bytes_per_s
        self._token_s = _FLOP_FACTOR * shape.flops_per_token / accelerator.flops_per_s
        self._pair_s = _FLOP_FACTOR * shape.flops_per_pair / accelerator.flops_per_s
        self._kv_token_s = _KV_FACTOR * shape.kv_bytes_per_token / accelerator.bytes_per_s
        self._move_token_s = shape.kv_bytes_per_token / accelerator.link_bytes_per_s
        self._attention_token_s = max(self._kv_token_s, self._pair_s)  # of a decoding sequence: one pair for each token that is read
        self._fixed_s = _STEP_S + shape.layer_count * _LAYER_S

    def step_ns(self, rows: Iterable[Row], decode_count: int = 0, decode_tokens: int = 0) -> int:
        """`decode_count` sequences decode besides the rows; they have `decode_tokens` tokens together."""
        tokens = row_count = decode_count
        read_tokens = decode_tokens
        pairs = float(decode_tokens)
        for row in rows:
            count, end = row.count, row.start + row.count
            row_count += 1
            tokens += count
            read_tokens += end
            pairs += count * (end - (count - 1) / 2)
        attention_s = max(read_tokens * self._kv_token_s, pairs * self._pair_s)
        return int((self._besides_attention_s(tokens, row_count) + attention_s) * self._scale)

    def decode_steps_ns(self, row_count: int, read_tokens: int, step_count: int) -> list[int]:
        """Of so many steps one after the other in which `row_count` sequences decode, which have `read_tokens` tokens before the first."""
        besides_s, token_s, scale = self._besides_attention_s(row_count, row_count), self._attention_token_s, self._scale
        reads = range(read_tokens, read_tokens + step_count * row_count, row_count)
        return [int((besides_s + read * token_s) * scale) for read in reads]

    def _besides_attention_s(self, tokens: int, row_count: int) -> float:
        return max(self._weights_s, tokens * self._token_s) + self._fixed_s + row_count * _ROW_S

    def pull_ns(self, pull: Pull, block_size: int) -> int:
        """Time to copy offered blocks over the link."""
        return int((pull.token_count - pull.first_block * block_size) * self._move_token_s * self._scale)
