"""Shares of a model's requests: groups of workers that have a weight each get their part, and the policy says which requests these are.

    canary 5, stable 95      of 100 requests that both could take at once, 5 and 95

Each decision entitles every group that could take the request at once to its part of it, and charges the group that gets it with all of
it. What a group is ahead by, in requests, counts against its workers beside everything else that the policy weighs. So the requests that go
to a small group are those that lose least by it, a conversation stays where its prefix is, and over many requests the shares are exact: no
group can be ahead by more than what the greatest difference of the other costs amounts to. While a group is saturated or gone it is neither
entitled nor charged, so nothing is made up for later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from polyphase.router.columns import filled
from polyphase.router.lineup import Lineup
from polyphase.router.types import DECODE, Leg, RouteRequest


class Share:
    """Requests by which the worker's group is ahead of its share, compared with the group that is furthest behind."""

    unit = "requests ahead of its group's share"

    def costs(self, request: RouteRequest, leg: Leg, workers: Lineup) -> Sequence[float] | None:
        if not workers.standings.has_shares or leg is DECODE:
            return None
        claimants = claimants_of(workers)
        if len(claimants) < 2:
            return None
        ahead = workers.standings.ahead
        least = min(ahead.get(group, 0.0) for group in claimants)
        costs = filled(len(workers))
        for row, view in enumerate(workers.standings.views):
            costs[row] = max(ahead.get(view.facts.group, 0.0) - least, 0.0)
        return costs


def claimants_of(workers: Lineup) -> dict[str, float]:
    """Weights of the groups that could take the request at once: with a worker that the filters left and that is not saturated."""
    standings = workers.standings
    rows: Iterable[int] = range(len(workers)) if workers.rows is None else workers.rows
    groups = {standings.views[row].facts.group for row in rows if row not in standings.saturated_rows}
    return {group: weight for group in groups if (weight := standings.weights[group]) > 0}


def settle(ahead: dict[str, float], claimants: Mapping[str, float], chosen: str) -> None:
    """One request went to a worker of the group `chosen`. One group alone has no share to keep."""
    if len(claimants) < 2 or chosen not in claimants:
        return
    total = sum(claimants.values())
    for group, weight in claimants.items():
        ahead[group] = ahead.get(group, 0.0) + (group == chosen) - weight / total
