"""Reasons to prefer a worker, each one a `Scorer`: figures of the workers in, scores in [0, 1] out.

A cost becomes a score by (lowest + 1) / (cost + 1): the best worker gets 1, one that costs twice as much about one half, and equal
costs equal scores. The 1 is one token.
"""

from __future__ import annotations

from collections.abc import Sequence

from polyphase.router.cost import load_tokens, request_tokens
from polyphase.router.types import Leg, RouteRequest, WorkerView


def scores_of_costs(costs: Sequence[float]) -> list[float]:
    """Costs are not negative."""
    lowest = min(costs, default=0.0)
    return [(lowest + 1.0) / (cost + 1.0) for cost in costs]


class PrefixAndLoad:
    """Cached prefix and load in one cost, so that neither can be had at any price of the other."""

    name = "prefix-and-load"

    def score(self, request: RouteRequest, leg: Leg, workers: Sequence[WorkerView]) -> Sequence[float]:
        return scores_of_costs([request_tokens(request, leg, worker) + load_tokens(request, leg, worker) for worker in workers])


class LeastLoaded:
    """Load alone: what is cached where does not count."""

    name = "least-loaded"

    def score(self, request: RouteRequest, leg: Leg, workers: Sequence[WorkerView]) -> Sequence[float]:
        return scores_of_costs([load_tokens(request, leg, worker) for worker in workers])
