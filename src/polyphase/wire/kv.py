"""How one worker tells another where KV blocks lie and for how long they may be read."""

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


class PoolDescriptor(msgspec.Struct, frozen=True):
    """A worker's block pool in shared memory. The file descriptor is handed over at `socket_path` (Unix socket, SCM_RIGHTS)."""

    pool_id: str  # random, new in each life of a worker
    socket_path: str
    block_count: int
    layout: KvLayout


class KvOffer(msgspec.Struct, frozen=True):
    """What a prefill worker hands over: blocks that hold the KV of the first `token_count` tokens.

    The blocks stay pinned until the reader releases `lease_id` at `endpoint` or the lease runs out at `expires_at_ns`
    (CLOCK_MONOTONIC of the host). Each block's generation changes when the block is given to somebody else: a reader that
    finds another generation after its copy has read something else and must not use it.
    """

    worker_id: str
    epoch: int
    endpoint: str  # request channel of the worker that holds the blocks
    lease_id: str
    expires_at_ns: int
    pool: PoolDescriptor
    block_ids: list[int]
    generations: list[int]
    token_count: int
