"""The event stream: what each worker publishes about its cache and its load.

A batch is fenced by worker id, epoch (new in each life of the worker) and sequence number (from 1, without a gap). Whoever sees a
gap, another epoch, or starts to listen, asks the worker for a `Snapshot` on the request channel and applies only what is newer.
"""

from __future__ import annotations

import enum

import msgspec


class Tier(enum.StrEnum):
    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    OBJECT = "object"


class BlocksStored(msgspec.Struct, frozen=True, tag="stored"):
    """These prefixes are cached now. `sequence_hashes` as in `core.hashing`; each stands for its whole prefix."""

    sequence_hashes: list[int]
    tier: Tier = Tier.DEVICE


class BlocksRemoved(msgspec.Struct, frozen=True, tag="removed"):
    sequence_hashes: list[int]
    tier: Tier = Tier.DEVICE


class AllCleared(msgspec.Struct, frozen=True, tag="cleared"):
    """The worker holds nothing any more."""


KvEvent = BlocksStored | BlocksRemoved | AllCleared


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """How busy a worker is. Counts ending in `_total` only grow within an epoch."""

    step: int = 0  # engine steps so far: a worker whose step stands still while requests run is stuck
    running_count: int = 0
    waiting_count: int = 0
    waiting_prefill_tokens: int = 0  # prompt tokens accepted and not computed yet, of waiting and running requests
    block_count: int = 0
    used_block_count: int = 0  # referenced by a request or a lease
    cached_block_count: int = 0  # unreferenced, kept for prefix hits; counted as free for capacity
    leased_block_count: int = 0
    prompt_tokens_total: int = 0
    cached_prompt_tokens_total: int = 0  # of these, served from the prefix cache
    transferred_tokens_total: int = 0  # of these, pulled from another worker
    generated_tokens_total: int = 0
    finished_total: int = 0
    preemptions_total: int = 0
    computed_tokens_total: int = 0  # went through the model: prompt and output tokens, those computed twice counted twice


class EventBatch(msgspec.Struct, frozen=True):
    """One message on the event stream; sent after a step that changed something and at least once a second."""

    worker_id: str
    epoch: int
    sequence: int
    events: list[KvEvent]
    load: Load
