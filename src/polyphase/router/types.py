"""What the router is told, what it answers, and the contracts of its parts.

RouteRequest ─► filter ─► score ─► pick ─► Route (booked)
                eligible   [0,1]    one
                workers    each     worker
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from polyphase.core.ids import Epoch, RequestId, SequenceHash, WorkerId
from polyphase.wire.cards import Role
from polyphase.wire.events import Load


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What does not change in one life of a worker, but for its role and whether it drains."""

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


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """A request as the router sees it. `sequence_hashes` are those of the full blocks of the prompt, for the model's block size."""

    request_id: RequestId
    model: str
    sequence_hashes: Sequence[SequenceHash]
    prompt_token_count: int
    max_output_tokens: int
    excluded: frozenset[WorkerId] = frozenset()  # tried in vain


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


@dataclass(frozen=True, slots=True)
class Placement:
    """One leg of a route: the worker chosen, and all candidates, best first."""

    leg: Leg
    worker_id: WorkerId
    epoch: Epoch
    overlap_block_count: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes. Without a `prefill` leg, `decode` does everything. `reason` is a phrase for a person."""

    request_id: RequestId
    decode: Placement
    prefill: Placement | None
    reason: str


class PrefixIndex(Protocol):
    """Which worker holds which prefixes. A sequence hash stands for its whole prefix."""

    def store(self, worker_id: WorkerId, hashes: Iterable[SequenceHash]) -> None: ...

    def remove(self, worker_id: WorkerId, hashes: Iterable[SequenceHash]) -> None: ...

    def clear(self, worker_id: WorkerId) -> None:
        """Forget all that this worker holds."""

    def match(self, hashes: Sequence[SequenceHash]) -> Mapping[WorkerId, int]:
        """Leading blocks of `hashes` that each worker holds; workers with none are left out."""

    def block_count(self, worker_id: WorkerId) -> int: ...


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


class Scorer(Protocol):
    """One reason to prefer a worker. Scores are in [0, 1], higher is better, comparable within one call only."""

    @property
    def name(self) -> str: ...

    def score(self, request: RouteRequest, leg: Leg, workers: Sequence[WorkerView]) -> Sequence[float]: ...


class Picker(Protocol):
    """Chooses among scored workers. `turn` counts the router's decisions: the source of anything like a tie-break."""

    def pick(self, scores: Sequence[float], workers: Sequence[WorkerView], turn: int) -> int: ...


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
