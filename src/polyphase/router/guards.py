"""Watches over parts that are not ours: what breaks their contract becomes one clear error instead of a wrong route.

Parts that come with Polyphase are held to their contracts by tests, and cost nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyphase.core.errors import PartFailed, Refused
from polyphase.router.contracts import Filter, Picker, Scorer
from polyphase.router.lineup import Lineup
from polyphase.router.types import Leg, RouteRequest

MAX_COST = 1e15


def guarded_scorer(name: str, scorer: Scorer) -> Scorer:
    return scorer if _is_ours(scorer) else _GuardedScorer(name, scorer)


def guarded_filter(name: str, one: Filter) -> Filter:
    return one if _is_ours(one) else _GuardedFilter(name, one)


def guarded_picker(name: str, picker: Picker) -> Picker:
    return picker if _is_ours(picker) else _GuardedPicker(name, picker)


def _is_ours(part: object) -> bool:
    return type(part).__module__.startswith("polyphase.router.")


@dataclass(frozen=True, slots=True)
class _GuardedScorer:
    name: str
    scorer: Scorer

    @property
    def unit(self) -> str:
        return self.scorer.unit

    def costs(self, request: RouteRequest, leg: Leg, workers: Lineup) -> Sequence[float] | None:
        try:
            given = self.scorer.costs(request, leg, workers)
            costs = None if given is None else [float(cost) for cost in given]
        except Exception as error:  # somebody else's code: whatever it raises
            raise _failed(self.name, request, f"raised {error!r}") from error
        if costs is None:
            return None
        if len(costs) != len(workers):
            raise _failed(self.name, request, f"gave {len(costs)} costs for {len(workers)} workers")
        wrong = next((cost for cost in costs if not 0.0 <= cost <= MAX_COST), None)
        if wrong is not None:
            raise _failed(self.name, request, f"gave a cost of {wrong:g}; costs are from 0 to {MAX_COST:g}")
        return costs


@dataclass(frozen=True, slots=True)
class _GuardedFilter:
    name: str
    filter: Filter

    @property
    def is_lasting(self) -> bool:
        return self.filter.is_lasting

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        try:
            kept = list(self.filter.keep(request, leg, workers, rows))
        except Exception as error:
            raise _failed(self.name, request, f"raised {error!r}") from error
        if kept != sorted(set(kept) & set(rows)):
            raise _failed(self.name, request, "kept rows that it was not given, or put them in another order")
        return kept

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        try:
            return self.filter.refusal(request, worker_count)
        except Exception as error:
            raise _failed(self.name, request, f"raised {error!r}") from error


@dataclass(frozen=True, slots=True)
class _GuardedPicker:
    name: str
    picker: Picker

    def pick(self, scores: Sequence[float], workers: Lineup, turn: int) -> int:
        try:
            row = self.picker.pick(scores, workers, turn)
        except Exception as error:
            raise PartFailed(f"the router part {self.name!r} raised {error!r}") from error
        rows = range(len(scores)) if workers.rows is None else workers.rows
        if not isinstance(row, int) or row not in rows:
            raise PartFailed(f"the router part {self.name!r} picked {row!r}, which is none of the {len(rows)} rows that it may pick")
        return row


def _failed(name: str, request: RouteRequest, what: str) -> PartFailed:
    return PartFailed(f"the router part {name!r} {what}", request_id=request.request_id)
