"""What the router is told, what it answers, and the contract of its index. The contracts of its scoring parts are in `lineup`.

RouteRequest ─► filter ─► score ─► pick ─► Route (booked)
                eligible   [0,1]    one
                workers    each     worker
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from polyphase.core.ids import Epoch, RequestId, SequenceHash, WorkerId
from polyphase.wire.cards import Role
from polyphase.wire.events import Load, Tier


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What does not change in one life of a worker, but for its role, and whether it drains or stands still."""

    worker_id: WorkerId
    epoch: Epoch
    model: str
    role: Role
    block_size: int  # tokens
    block_count: int
    max_batch_tokens: int
    max_running: int
    can_hand_over: bool
    is_draining: bool = False
    is_stalled: bool = False


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """A request as the router sees it. `sequence_hashes` are those of the full blocks of the prompt, for the model's block size."""

    request_id: RequestId
    model: str
    sequence_hashes: Sequence[SequenceHash]
    prompt_token_count: int
    max_output_tokens: int
    excluded: frozenset[WorkerId] = frozenset()  # tried in vain
    now_ns: int = 0  # for an index that predicts; any clock that goes forward


class Leg(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One eligible worker with its score in [0, 1] (higher is better) and the figures behind it, kept for `why was it sent there?`."""

    worker_id: WorkerId
    score: float
    overlap_block_count: int
    booked_prefill_tokens: int
    booked_block_count: int
    booked_request_count: int
    queued_prefill_tokens: int | None = None  # ahead of the request, those of other frontends included
    used_block_count: int | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """One leg of a route: the worker chosen, and all candidates, best first (put in order when they are first looked at)."""

    leg: Leg
    worker_id: WorkerId
    epoch: Epoch
    overlap_block_count: int
    candidates: Sequence[Candidate]


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes. Without a `prefill` leg, `decode` does everything. `reason` is a phrase for a person."""

    request_id: RequestId
    decode: Placement
    prefill: Placement | None
    reason: str
    rule: str = ""  # the reason in short, for headers: split | short-prompt | cached | no-prefill-worker


class Overlaps(Protocol):
    """What a match found: how many leading blocks of a prompt each worker holds.

    A tier counts together with the faster ones: device <= host <= disk <= object. A block counts only if all blocks before it do, so
    what a slower tier adds is the difference to the faster one. Keeps what was true at the match.
    """

    def depth(self, worker_id: WorkerId, tier: Tier = Tier.DEVICE) -> int:
        """0 for a worker that holds none, or is unknown."""

    def depths(self, worker_ids: Sequence[WorkerId], tier: Tier = Tier.DEVICE) -> list[int]:
        """In the order of `worker_ids`; a tuple that is asked for again and again is fastest."""

    def tokens_beyond(
        self, worker_ids: Sequence[WorkerId], block_size: int, token_count: int, at_least: int = 0, tier: Tier = Tier.DEVICE
    ) -> list[int]:
        """Of a prompt of `token_count` tokens, those behind the blocks that each worker holds; not fewer than `at_least`."""

    def as_dict(self, tier: Tier = Tier.DEVICE) -> dict[WorkerId, int]:
        """Without the workers that hold none."""


class PrefixIndex(Protocol):
    """Which worker holds which prefixes, in which tier. A sequence hash stands for its whole prefix.

    A store that many workers share is a holder of its own, under a name that no worker has. Hashes are in [0, 2**64). Beyond
    `capacity` blocks, some are forgotten for all workers: that costs hits, and is counted.
    """

    @property
    def capacity(self) -> int: ...

    @property
    def size(self) -> int:
        """What counts against `capacity`: different blocks that are held by anybody, whoever and how many."""

    @property
    def forgotten(self) -> int:
        """Blocks lost for want of room, ever."""

    def store(self, worker_id: WorkerId, hashes: Iterable[SequenceHash], tier: Tier = Tier.DEVICE) -> None:
        """In any order; quickest in the order of the prompt."""

    def remove(self, worker_id: WorkerId, hashes: Iterable[SequenceHash], tier: Tier = Tier.DEVICE) -> None:
        """Hashes that this worker does not hold are ignored: a snapshot may already have left them out."""

    def clear(self, worker_id: WorkerId) -> None:
        """Forget all that this worker holds, in all tiers."""

    def match(self, hashes: Sequence[SequenceHash]) -> Overlaps: ...

    def block_count(self, worker_id: WorkerId, tier: Tier = Tier.DEVICE) -> int: ...


@dataclass(frozen=True, slots=True)
class WorkerView:
    """All that a scorer may look at for one eligible worker."""

    facts: WorkerFacts
    load: Load | None  # as last reported; None before the first report
    overlap_block_count: int
    booked_prefill_tokens: int
    booked_block_count: int
    booked_request_count: int
    unreported_prefill_tokens: int = 0  # of the booked ones, those that came after `load` was reported
    unreported_block_count: int = 0

    def with_overlap(self, overlap_block_count: int) -> WorkerView:
        """The same worker, for a request that has so many blocks there."""
        if overlap_block_count == self.overlap_block_count:
            return self
        # As `replace` would, at a third of its cost.
        return WorkerView(
            self.facts,
            self.load,
            overlap_block_count,
            self.booked_prefill_tokens,
            self.booked_block_count,
            self.booked_request_count,
            self.unreported_prefill_tokens,
            self.unreported_block_count,
        )


@dataclass(frozen=True, slots=True)
class SplitRule:
    """When prefill and decode run on different workers."""

    min_uncached_tokens: int = 256  # prompts with fewer tokens to compute stay on the decode worker
    min_uncached_fraction: float = 0.3  # and so do those that are mostly cached there


@dataclass(frozen=True, slots=True)
class RouterSettings:
    policy: str = "kv"  # kv | least-loaded | round-robin
    split: SplitRule = field(default_factory=SplitRule)
    first_turn: int = 0  # ties are broken in turns; several routers that begin at different ones do not pick the same worker at once
    max_waiting_requests: int = 1024  # per worker, beyond those it runs at once; when all are full, requests are refused
