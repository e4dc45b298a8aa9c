"""What the router is told, what it answers, and the contract of its index. The contracts of its scoring parts are in `contracts`.

RouteRequest ─► filter ─► score ─► pick ─► Route (booked)
                eligible   [0,1]    one
                workers    each     worker

What a decision makes anew are msgspec structs: they are made in a quarter of the time that a frozen dataclass takes.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import msgspec

from polyphase.core.ids import Epoch, RequestId, SequenceHash, WorkerId
from polyphase.router.columns import Column
from polyphase.wire.cards import BLOCKS, Role
from polyphase.wire.events import Load, Tier

Labels = Mapping[str, str]  # for example zone → eu-1, rack → 7
NO_LABELS: Labels = MappingProxyType({})


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
    can_hand_over: bool  # it makes offers
    is_draining: bool = False
    is_stalled: bool = False
    is_asleep: bool = False
    publishes_events: bool = True  # of its blocks; where not, what was routed there is believed to be there
    passes: frozenset[str] = frozenset()  # kinds of requests whose bodies its engine takes as they are
    engine: str = ""
    group: str = ""
    weight: float | None = None  # of its group; None: nobody set one
    adapters: frozenset[str] = frozenset()
    context_length: int | None = None  # tokens; None: long enough for all that comes
    labels: Labels = field(default_factory=lambda: NO_LABELS, hash=False)
    takes_grammars: bool = False
    resumes_grammars: bool = False  # also of requests of which something was emitted elsewhere
    offer_kind: str = BLOCKS  # which offers it makes, if it does, and takes; "": none
    serves_whole: bool = True  # else only the leg that its role says
    offer_facts: Labels = field(default_factory=lambda: NO_LABELS, hash=False)  # what must be equal, for people to be told what differs

    @property
    def is_available(self) -> bool:
        return not (self.is_draining or self.is_stalled or self.is_asleep)


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """A request as the router sees it.

    `sequence_hashes` are those of the full blocks of the prompt, for the block size of the model's workers; where they differ in it, for
    the smallest, and `other_hashes` has those for the others.
    """

    request_id: RequestId
    model: str
    sequence_hashes: Sequence[SequenceHash]
    prompt_token_count: int
    max_output_tokens: int
    excluded: frozenset[WorkerId] = frozenset()  # tried in vain
    now_ns: int = 0  # for what is forgotten in time; any clock that goes forward
    session: int | None = None  # hash of what the client says belongs together; `frontend.sessions`
    preferred_labels: Labels = field(default_factory=lambda: NO_LABELS, hash=False)
    required_labels: Labels = field(default_factory=lambda: NO_LABELS, hash=False)
    needs: frozenset[str] = frozenset()  # of a request that is passed through: what its worker has to pass. Such a one is never split
    adapter: str | None = None  # LoRA adapter of the model; only workers that have it will do
    other_hashes: Mapping[int, Sequence[SequenceHash]] | None = field(default=None, hash=False)  # by block size
    has_grammar: bool = False  # its output is structured
    is_begun: bool = False  # some of it was emitted already

    @property
    def is_ordinary(self) -> bool:
        """Whether all that lasting filters look at are the workers' facts."""
        return not (self.excluded or self.required_labels or self.adapter or self.has_grammar or self.needs)

    def hashes_of(self, block_size: int) -> Sequence[SequenceHash]:
        """For a worker with blocks of this size."""
        return self.other_hashes.get(block_size, self.sequence_hashes) if self.other_hashes else self.sequence_hashes


class Leg(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    __hash__ = str.__hash__  # the enum's own is Python code; equal members are equal texts


# For what runs at each decision: to look a member up in its enum takes as long as a call, in Python 3.11.
PREFILL, DECODE, BOTH = Leg.PREFILL, Leg.DECODE, Leg.BOTH


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
    held_block_count: int | None = None  # leading blocks in any tier; `overlap_block_count` are those on the device
    costs: tuple[tuple[str, float], ...] = ()  # by scorer, in tokens of prefill; the score comes of their sum
    block_size: int = 16  # tokens, of its blocks
    group: str = ""


class Placement(msgspec.Struct, frozen=True):
    """One leg of a route: the worker chosen, and all candidates, best first (put in order when they are first looked at)."""

    leg: Leg
    worker_id: WorkerId
    epoch: Epoch
    overlap_block_count: int
    candidates: Sequence[Candidate]
    queued_prefill_tokens: int | None = None  # ahead of the request there, as far as the router knew; None: it did not matter
    block_size: int = 16  # tokens, of the worker's blocks


class Pull(msgspec.Struct, frozen=True):
    """Blocks of a prompt that another worker holds, and the one that computes the prompt does not. Times are estimates of `router.pull`."""

    holder: WorkerId
    epoch: Epoch
    token_count: int  # leading tokens that it is said to hold
    saved_token_count: int  # those of them that need not be computed then
    is_wanted: bool
    compute_ms: float | None = None  # what they would take; None: not measured yet
    pull_ms: float | None = None


class Route(msgspec.Struct, frozen=True):
    """Where a request goes. Without a `prefill` leg, `decode` does everything. `reason` is a phrase for a person.

    `pull` is for the worker that computes the prompt; None if nobody else holds more of it.
    """

    request_id: RequestId
    decode: Placement
    prefill: Placement | None
    reason: str
    rule: str = ""  # the reason in short, for headers: split | short-prompt | cached | does-not-pay | no-prefill-worker | passed-through
    pull: Pull | None = None


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
    ) -> Column:
        """Of a prompt of `token_count` tokens, those behind the blocks that each worker holds; not fewer than `at_least`. A new column."""

    @property
    def level_count(self) -> int:
        """1 if tiers below the device hold nothing of anybody, so that all tiers agree."""

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

    @property
    def kind(self) -> str:
        """What it is made of: native, naive."""

    @property
    def heap_bytes(self) -> int:
        """Memory it takes, about. Cost: up to a millisecond."""

    def store(self, worker_id: WorkerId, hashes: Iterable[SequenceHash], tier: Tier = Tier.DEVICE) -> None:
        """In any order; quickest in the order of the prompt."""

    def remove(self, worker_id: WorkerId, hashes: Iterable[SequenceHash], tier: Tier = Tier.DEVICE) -> None:
        """Hashes that this worker does not hold are ignored: a snapshot may already have left them out."""

    def clear(self, worker_id: WorkerId) -> None:
        """Forget all that this worker holds, in all tiers."""

    def match(self, hashes: Sequence[SequenceHash]) -> Overlaps:
        """`hashes` are those of a prompt or of its end, in order: each stands for all before it, so they may be searched, not walked."""

    def block_count(self, worker_id: WorkerId, tier: Tier = Tier.DEVICE) -> int: ...

    def digest(self, worker_id: WorkerId, tier: Tier = Tier.DEVICE) -> tuple[int, int] | None:
        """Count and sum (`core.digest`) of the blocks this worker is said to hold, those among them that were forgotten for want of room.

        None: this index does not follow what workers say. A removed block that is not held is taken for a forgotten one, if there are any.
        """


class WorkerView(msgspec.Struct, frozen=True):
    """One worker as it stands."""

    facts: WorkerFacts
    load: Load | None  # as last reported; None before the first report
    overlap_block_count: int
    booked_prefill_tokens: int
    booked_block_count: int
    booked_request_count: int
    unreported_prefill_tokens: int = 0  # of the booked ones, those that came after `load` was reported
    unreported_block_count: int = 0
    unreported_request_count: int = 0

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
            self.unreported_request_count,
        )


@dataclass(frozen=True, slots=True)
class SplitRule:
    """When prefill and decode run on different workers."""

    min_uncached_tokens: int = 256  # prompts with fewer tokens to compute stay on the decode worker
    min_uncached_fraction: float = 0.3  # and so do those that are mostly cached there
    is_weighed: bool = False  # beyond that, only what pays by the paces measured is split; while they are unknown, everything


@dataclass(frozen=True, slots=True)
class PullRule:
    """When the KV of a prompt's beginning is pulled from another worker that holds it."""

    is_on: bool = False
    min_tokens: int = 128  # fewer are computed before a question is answered


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """A named policy, and what is changed of it. `parts` and `policies` know the names."""

    name: str = "kv"  # kv | least-loaded | round-robin
    weights: Mapping[str, float] = field(default_factory=dict, hash=False)  # of scorers, in place of the policy's own; 0 switches one off
    temperature: float = 0.0  # 0: always the best; 1: half the score, half as often
    filters: tuple[str, ...] = ()  # besides those of every policy
    picker: str = "best"


@dataclass(frozen=True, slots=True)
class SessionRule:
    """How long and of how many sessions the router remembers where they were."""

    capacity: int = 100_000  # about 0.3 kB each
    idle_ns: int = 600 * 10**9


@dataclass(frozen=True, slots=True)
class IndexFill:
    """How full the index is, for people."""

    kind: str  # native, naive
    block_count: int
    capacity: int  # blocks
    forgotten_block_count: int  # for want of room, ever
    believed_block_count: int  # of these blocks, those of workers that tell nothing, counted for each
    heap_bytes: int


@dataclass(frozen=True, slots=True)
class IndexSettings:
    """What is remembered of the blocks that workers hold."""

    capacity: int | None = None  # blocks, over all workers; None: what the index has by default
    follows_events: bool = True  # False: no worker's are believed, what was routed there is
    predicted_lifetime_ns: int = 120 * 10**9  # how long that is. Source: Dynamo's approximate mode


@dataclass(frozen=True, slots=True)
class RouterSettings:
    policy: PolicySettings = field(default_factory=PolicySettings)
    split: SplitRule = field(default_factory=SplitRule)
    first_turn: int = 0  # equals are chosen in another order by routers that begin elsewhere, so that not all pick the same one at once
    max_waiting_requests: int = 1024  # per worker, beyond those it runs at once; when all are full, requests wait at the frontend
    sessions: SessionRule = field(default_factory=SessionRule)
    index: IndexSettings = field(default_factory=IndexSettings)
    pull: PullRule = field(default_factory=PullRule)
