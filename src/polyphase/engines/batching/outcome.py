"""What the execution of a step plan brought: pulled blocks, computed rows, sampled tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from polyphase.engines.batching.scheduler import Pull, Row
from polyphase.engines.batching.sequence import Sequence
from polyphase.wire.requests import TokenLogprob


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class PullResult:
    """`token_count`: so many tokens of the sequence are there now, which with an `error` are fewer than planned."""

    pull: Pull
    token_count: int
    byte_count: int
    duration_ms: float
    error: str | None


@dataclass(slots=True)
class StepOutcome:
    """`computed` are the rows that were run; `samples` has an entry for each of them that was to be sampled, None if that failed."""

    pulls: list[PullResult] = field(default_factory=list)
    computed: list[Row] = field(default_factory=list)
    samples: dict[Sequence, SampledToken | None] = field(default_factory=dict)
    error: Exception | None = None
