"""The event stream: what each worker publishes about its cache and its load.

A batch is fenced by worker id, epoch (new in each life of the worker) and sequence number (from 1, without a gap), and carries a
digest of what the worker holds once it is applied. Whoever starts to listen asks the worker for a snapshot on the request channel, in
pages; whoever sees a gap asks for the batches that are missing. `docs/events.md` tells the protocol for those who implement it.
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec


class Tier(enum.StrEnum):
    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    OBJECT = "object"


Hash = Annotated[int, msgspec.Meta(ge=0)]  # a sequence hash: below 2**64, which msgpack sees to


class BlocksStored(msgspec.Struct, frozen=True, tag="stored"):
    """These prefixes are cached now. `sequence_hashes` as in `core.hashing`; each stands for its whole prefix."""

    sequence_hashes: list[Hash]
    tier: Tier = Tier.DEVICE


class BlocksRemoved(msgspec.Struct, frozen=True, tag="removed"):
    sequence_hashes: list[Hash]
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
    outage: str = ""  # why it can serve nothing at the moment, in its own words; it is left alone until it takes that back


class TierDigest(msgspec.Struct, frozen=True, array_like=True):
    """What a worker holds in one tier, in short. `hash_sum` as in `core.digest`."""

    block_count: int
    hash_sum: int


Digests = dict[Tier, TierDigest]  # tiers in which nothing is held are left out


class EventBatch(msgspec.Struct, frozen=True):
    """One message on the event stream; sent after a step that changed something and at least once a second.

    `digests` is of what the worker holds after these events. None: this worker tells none, and drift is not looked for.
    """

    worker_id: str
    epoch: int
    sequence: int
    events: list[KvEvent]
    load: Load
    digests: Digests | None = None


class SnapshotPage(msgspec.Struct, frozen=True, tag="snapshot"):
    """A part of what the worker holds, read when `sequence` was the last batch.

    Pages are read one after the other while the stream goes on. What they say together is put right by the batches behind the
    `sequence` of the first page, and is exact from that of the last one.
    """

    worker_id: str
    epoch: int
    sequence: int
    blocks: dict[Tier, bytes] = {}  # sequence hashes, uint64 little-endian, at best in the order in which prompts hold them
    next_cursor: str | None = None  # for the question for the next page; None: this is the last one
    device_hashes: list[Hash] = []  # from workers older than tiers in snapshots, which send one page


class MissedBatches(msgspec.Struct, frozen=True, tag="missed"):
    """The batches behind the one asked for, oldest first and without a gap, perhaps not all: ask on. None if they are no longer kept."""

    worker_id: str
    epoch: int
    batches: list[msgspec.Raw]  # each an `EventBatch`, as it was published
