"""Reasons to prefer a worker, each one a `Scorer`: figures of the workers in, scores in [0, 1] out."""

from __future__ import annotations

from collections.abc import Sequence

from polyphase.router.columns import scores_of_costs
from polyphase.router.cost import COMPUTE_WEIGHT, MOVE_WEIGHT, tokens_needed, uncached_at_least
from polyphase.router.lineup import Lineup
from polyphase.router.types import Leg, RouteRequest


def load_costs(request: RouteRequest, leg: Leg, workers: Lineup) -> list[float]:
    """Per worker, what it has to do besides this request, and the tokens for which it has no room."""
    standings = workers.standings
    needed = tokens_needed(request, leg)
    if needed <= standings.least_room_tokens:
        return standings.load_tokens
    return [load + (needed - room if needed > room else 0) for load, room in zip(standings.load_tokens, standings.room_tokens, strict=True)]


class PrefixAndLoad:
    """Cached prefix and load in one cost, so that neither can be had at any price of the other."""

    name = "prefix-and-load"

    def score(self, request: RouteRequest, leg: Leg, workers: Lineup) -> Sequence[float]:
        to_compute = workers.tokens_beyond(request.prompt_token_count, at_least=uncached_at_least(request))
        return scores_of_costs(load_costs(request, leg, workers), to_compute, MOVE_WEIGHT if leg is Leg.DECODE else COMPUTE_WEIGHT)


class LeastLoaded:
    """Load alone: what is cached where does not count."""

    name = "least-loaded"

    def score(self, request: RouteRequest, leg: Leg, workers: Lineup) -> Sequence[float]:
        return scores_of_costs(load_costs(request, leg, workers), [0] * len(workers))
