"""The shape of a KV block in memory."""

from __future__ import annotations

import msgspec


class KvLayout(msgspec.Struct, frozen=True):
    """Shape of one KV block in memory; a block is contiguous over all layers:

        block = [layer_count, 2 (keys, values), block_size, kv_head_count, head_dim] of dtype

    Two workers may copy blocks byte by byte if their layouts are equal; `fingerprint` also holds the model, so that
    blocks of another model with the same shape do not pass.
    """

    dtype: str  # "float32", "bfloat16", "float16"
    layer_count: int
    kv_head_count: int
    head_dim: int
    block_size: int  # tokens
    block_bytes: int
    fingerprint: str
