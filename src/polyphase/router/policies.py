"""The named policies: which scorers with which weights, and which picker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from polyphase.core.errors import ConfigurationError
from polyphase.router.lineup import Lineup, Picker, Scorer
from polyphase.router.pickers import HighestScore
from polyphase.router.scorers import LeastLoaded, PrefixAndLoad
from polyphase.router.types import Leg, RouteRequest


@dataclass(frozen=True, slots=True)
class WeightedScorer:
    scorer: Scorer
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Policy:
    """Without scorers all workers are equal, and the picker's turns alone decide: that is round robin."""

    name: str
    scorers: tuple[WeightedScorer, ...] = ()
    picker: Picker = field(default_factory=HighestScore)

    def score(self, request: RouteRequest, leg: Leg, workers: Lineup) -> Sequence[float]:
        """Weighted mean of the scorers, in [0, 1]."""
        if not self.scorers:
            return [1.0] * len(workers)
        if len(self.scorers) == 1:
            return self.scorers[0].scorer.score(request, leg, workers)
        sums = [0.0] * len(workers)
        for weighted in self.scorers:
            scores = weighted.scorer.score(request, leg, workers)
            sums = [total + weighted.weight * score for total, score in zip(sums, scores, strict=True)]
        whole = sum(weighted.weight for weighted in self.scorers)
        return [total / whole for total in sums]


POLICIES: Mapping[str, Callable[[], Policy]] = {
    "kv": lambda: Policy("kv", (WeightedScorer(PrefixAndLoad()),)),
    "least-loaded": lambda: Policy("least-loaded", (WeightedScorer(LeastLoaded()),)),
    "round-robin": lambda: Policy("round-robin"),
}


def policy_named(name: str) -> Policy:
    """Raises: ConfigurationError, naming the policies that exist."""
    make = POLICIES.get(name)
    if make is None:
        raise ConfigurationError(f"there is no router policy {name!r}; choose one of {', '.join(POLICIES)}")
    return make()
