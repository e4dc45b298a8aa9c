"""What is being asked about: a model on an accelerator with an engine, and how its tokens come about."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from polyphase.advisor.accelerators import Accelerator
from polyphase.advisor.precision import Precision
from polyphase.advisor.shapes import ModelShape


class Serving(enum.StrEnum):
    AGGREGATED = "agg"
    DISAGGREGATED = "disagg"


@dataclass(frozen=True, slots=True)
class Speculation:
    """Multi-token prediction or another draft: tokens drafted per step, and how probable each is accepted if those before it were."""

    draft_tokens: int = 0
    acceptance: float = 0.8

    @property
    def tokens_per_step(self) -> float:
        """Expected tokens that a step yields: 1 + a + a² + … Source: Leviathan et al., arXiv 2211.17192."""
        return sum(self.acceptance**n for n in range(self.draft_tokens + 1))


NO_SPECULATION = Speculation()


@dataclass(frozen=True, slots=True)
class Setting:
    """All of a deployment but its parallel mapping and its load."""

    shape: ModelShape
    accelerator: Accelerator
    precision: Precision
    backend: str
    version: str | None = None  # of the engine; None: whichever was measured most, empty: a measurement that did not say
    serving: Serving = Serving.AGGREGATED
    speculation: Speculation = NO_SPECULATION

    @property
    def model_key(self) -> str:
        """Models of one architecture and size are one model to performance, whatever they were trained to say."""
        s = self.shape
        return f"{s.family}-{s.layer_count}x{s.hidden_size}-{s.attention.query_head_count}h-{s.experts.expert_count if s.experts else 0}e"


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests of one kind, or the mean of a mixture (`goal.traffic_from_requests`). All in tokens; 0 means: as the others imply."""

    isl: float
    osl: float
    cached_tokens: float = 0.0  # of the prompt, found in the engine's prefix cache
    context_tokens: float = 0.0  # that a decode step sees on average
    longest_tokens: float = 0.0  # of a whole request

    @property
    def seen_tokens(self) -> float:
        return self.context_tokens or self.isl + self.osl / 2

    @property
    def whole_tokens(self) -> float:
        return self.longest_tokens or self.isl + self.osl
