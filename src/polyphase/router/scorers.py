"""Reasons to avoid a worker, each one a `contracts.Scorer`: figures of the workers in, a cost per worker out.

    of the prompt   held on the device │ host │ disk │ object │ nowhere
    whole, prefill       free           host    disk   object   uncached        tokens, each with its own weight
    decode               free           moved ───────────────────────►          copied from the prefill worker

Units and default weights: docs/router.md, and `polyphase router parts`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from polyphase.router.columns import filled
from polyphase.router.cost import tokens_needed
from polyphase.router.lineup import Lineup
from polyphase.router.types import DECODE, Leg, RouteRequest
from polyphase.wire.events import Tier

_LOWEST = Tier.OBJECT
_FASTER = {Tier.HOST: Tier.DEVICE, Tier.DISK: Tier.HOST, Tier.OBJECT: Tier.DISK}


class Uncached:
    """The prompt's tokens that the worker holds in no tier, and would have to compute."""

    unit = "tokens to compute"

    def costs(self, request: RouteRequest, leg: Leg, workers: Lineup) -> Sequence[float] | None:
        return None if leg is DECODE else workers.tokens_beyond(request.prompt_token_count, _LOWEST)


class InTier:
    """The prompt's tokens that rest in one of the lower tiers, and would have to be brought up to the device."""

    def __init__(self, tier: Tier) -> None:
        self.unit = f"tokens to bring up from {tier}"
        self._tier = tier

    def costs(self, request: RouteRequest, leg: Leg, workers: Lineup) -> Sequence[float] | None:
        if not workers.uses_lower_tiers or leg is DECODE:
            return None
        count = request.prompt_token_count
        beyond_faster, beyond = workers.tokens_beyond(count, _FASTER[self._tier]), workers.tokens_beyond(count, self._tier)
        return array("d", (without - there for without, there in zip(beyond_faster, beyond, strict=True)))


class Moved:
    """On a decode leg: the prompt's tokens whose KV is copied from the prefill worker, because the device does not hold them."""

    unit = "tokens to move"

    def costs(self, request: RouteRequest, leg: Leg, workers: Lineup) -> Sequence[float] | None:
        return workers.tokens_beyond(request.prompt_token_count) if leg is DECODE else None


class Distance:
    """On a decode leg: the tokens to move, once for each label in which the worker differs from the prefill worker.

    With labels for zone, rack and link, a partner on the same link costs nothing, one in another zone three times as much as one that
    differs in the link alone.
    """

    unit = "tokens to move x labels that differ"

    def costs(self, request: RouteRequest, leg: Leg, workers: Lineup) -> Sequence[float] | None:
        if leg is not DECODE or workers.partner is None or not workers.partner.labels:
            return None
        moved = workers.tokens_beyond(request.prompt_token_count)
        differing = workers.standings.differing_labels(workers.partner.labels)
        return array("d", (tokens * labels for tokens, labels in zip(moved, differing, strict=True)))


class Queued:
    """Prompt tokens that are computed there before this request's."""

    unit = "tokens queued for prefill"

    def costs(self, request: RouteRequest, leg: Leg, workers: Lineup) -> Sequence[float] | None:
        return workers.standings.queued_tokens


class Decode:
    """KV in use: every decode step reads all of it."""

    unit = "tokens of KV in use"

    def costs(self, request: RouteRequest, leg: Leg, workers: Lineup) -> Sequence[float] | None:
        return workers.standings.used_tokens


class Overflow:
    """Tokens for which the pool has no room: they wait, or push somebody out."""

    unit = "tokens without room"

    def costs(self, request: RouteRequest, leg: Leg, workers: Lineup) -> Sequence[float] | None:
        needed = tokens_needed(request, leg)
        if needed <= workers.standings.least_room_tokens or workers.standings.has_room_everywhere(needed):
            return None
        return array("d", (max(needed - room, 0.0) for room in workers.standings.room_tokens))


class Requests:
    """Requests that run or wait there."""

    unit = "requests in flight"

    def costs(self, request: RouteRequest, leg: Leg, workers: Lineup) -> Sequence[float] | None:
        return workers.standings.request_counts


class Session:
    """Every worker but the one where the request's session was last, if that one may be chosen."""

    unit = "1 if the session was last elsewhere"

    def costs(self, request: RouteRequest, leg: Leg, workers: Lineup) -> Sequence[float] | None:
        if workers.home is None:
            return None
        worker_id, epoch = workers.home
        row = workers.standings.rows.get(worker_id)
        if row is None or workers.standings.views[row].facts.epoch != epoch:
            return None
        if workers.rows is not None and row not in workers.rows:
            return None
        costs = filled(len(workers), 1.0)
        costs[row] = 0.0
        return costs


class Labels:
    """The labels that the request prefers and the worker does not carry."""

    unit = "labels that differ"

    def costs(self, request: RouteRequest, leg: Leg, workers: Lineup) -> Sequence[float] | None:
        return workers.standings.differing_labels(request.preferred_labels) if request.preferred_labels else None
