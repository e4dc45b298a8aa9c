"""A policy is a list of filters, a list of scorers with their weights, and a picker. The named ones are such lists and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polyphase.core.errors import ConfigurationError
from polyphase.router.columns import Column, scores_of
from polyphase.router.contracts import Filter, Picker, Scorer
from polyphase.router.guards import guarded_filter, guarded_picker, guarded_scorer
from polyphase.router.lineup import Lineup
from polyphase.router.parts import BUILT_IN, Parts, unknown_name
from polyphase.router.types import Leg, PolicySettings, RouteRequest

MAX_WEIGHT = 1e9

# Weights are tokens of prefill for one unit of the part.
_LOAD = {
    "queued": 1.0,
    "decode": 0.25,  # a KV token in use slows every later step a little; computing a token takes its full time once
    "overflow": 1.0,
}
_SHARE = {"share": 4096.0}  # more than most prompts cost anywhere, so that shares are kept closely; less than leaving a long prefix costs
POLICIES: Mapping[str, Mapping[str, float]] = {
    "kv": {
        # A token of the queue delays this request. One that is computed a second time also delays all that come after it, and takes the
        # place of something else in a cache: so leaving a cached prefix must save three times the tokens that it costs. Source:
        # benchmarks/routing_quality.py; of the weights from 1 to 4, 3 had the shortest p99 of TTFT on a trace near saturation, and 2 on
        # chats, by 5 %.
        "uncached": 3.0,
        # Bringing KV up costs a part of computing it anew. Source: Dynamo's credits, 0.75 of a hit for host memory and 0.25 for disk.
        "host": 0.75,
        "disk": 2.25,
        "object": 2.5,
        "moved": 0.05,  # copied, not computed
        "distance": 0.05,
        "session": 512.0,  # a step or so of prefill: enough to decide between equals, too little to queue for
        "labels": 2048.0,
        **_LOAD,
        **_SHARE,
    },
    "least-loaded": {**_LOAD, **_SHARE},
    "round-robin": _SHARE,  # all workers are equal, and equals take turns
}
FILTERS = (  # of every policy
    "draining", "asleep", "stalled", "excluded", "required-labels", "passes", "adapter", "grammars", "role", "context", "full", "mates",
    "reserve",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weighted:
    name: str
    scorer: Scorer
    weight: float


@dataclass(slots=True)
class Weighing:
    """Scores of a decision, and the columns behind them, of which those that belong to the standings change with the next decision."""

    scores: Column
    parts: list[Weighted]  # those that made a difference
    columns: list[Sequence[float]]  # one for each of `parts`


@dataclass(frozen=True, slots=True)
class Policy:
    """Lasting filters come before the passing ones; see `contracts.Filter`."""

    lasting_filters: tuple[Filter, ...]
    passing_filters: tuple[Filter, ...]
    scorers: tuple[Weighted, ...]
    picker: Picker

    @property
    def weighs_workers(self) -> bool:
        """Whether it is of any account how a worker stands; if not, they take turns, within their groups' shares."""
        return any(part.name not in _SHARE for part in self.scorers)

    def weigh(self, request: RouteRequest, leg: Leg, workers: Lineup) -> Weighing:
        """Scores in (0, 1] for the rows that the filters have left."""
        columns: list[Sequence[float]] = []
        weights: list[float] = []
        parts: list[Weighted] = []
        for part in self.scorers:
            column = part.scorer.costs(request, leg, workers)
            if column is not None:
                columns.append(column)
                weights.append(part.weight)
                parts.append(part)
        return Weighing(scores_of(len(workers.standings.views), columns, weights, workers.rows), parts, columns)


def policy_of(settings: PolicySettings, parts: Parts = BUILT_IN) -> Policy:
    """Raises: ConfigurationError, naming the part that is wrong and the nearest ones that exist."""
    base = POLICIES.get(settings.name)
    if base is None:
        raise unknown_name("router policy", settings.name, POLICIES)
    for name, weight in settings.weights.items():
        if not (isinstance(weight, int | float) and math.isfinite(weight) and 0 <= weight <= MAX_WEIGHT):
            raise ConfigurationError(f"the weight of {name!r} is {weight!r}; it must be a number from 0 (off) to {MAX_WEIGHT:g}")
    weights = {**base, **settings.weights}
    # Every name is looked up, also that of a part that is switched off: a slip of the pen would switch off nothing.
    scorers = [Weighted(name, guarded_scorer(name, parts.scorer(name)), float(weight)) for name, weight in weights.items()]
    own = [guarded_filter(name, parts.filter(name)) for name in dict.fromkeys(settings.filters) if name not in FILTERS]
    filters = [*(BUILT_IN.filter(name) for name in FILTERS), *own]
    return Policy(
        lasting_filters=tuple(one for one in filters if one.is_lasting),
        passing_filters=tuple(one for one in filters if not one.is_lasting),
        scorers=tuple(part for part in scorers if part.weight),
        picker=guarded_picker(settings.picker, parts.picker(settings.picker)(settings.temperature)),
    )
