"""Which workers may take which leg of a request, each reason one `contracts.Filter`, in this order:

draining   leaves, and takes nothing new
asleep     gave its accelerator's memory free
stalled    is there and makes no progress
excluded   was tried for this request in vain
labels     does not carry a label that the request requires
role         role      whole request   decode leg   prefill leg
             both      yes             yes          no: it would decode there as well as anywhere
             decode    yes             yes          no
             prefill   only if alone   no           yes, if it can hand over to one that decodes
             (who does one half only never serves a whole request)
taker        takes no offer of the worker that computes the prompt
full       runs and queues as many requests of this router as it may
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from polyphase.core.errors import NoWorkers, Overloaded, Refused
from polyphase.router.lineup import Lineup
from polyphase.router.types import Leg, RouteRequest, WorkerFacts
from polyphase.wire.cards import Role


class Draining:
    """leave, and take nothing new"""

    is_lasting = True

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        views = workers.standings.views
        return [row for row in rows if not views[row].facts.is_draining]

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        return NoWorkers(
            f"{every(worker_count)} of the model {request.model!r} is draining; retry when another has joined",
            retry_after_s=5,
            request_id=request.request_id,
        )


class Asleep:
    """are asleep"""

    is_lasting = True

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        views = workers.standings.views
        return [row for row in rows if not views[row].facts.is_asleep]

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        return NoWorkers(
            f"{every(worker_count)} of the model {request.model!r} is asleep; somebody has to wake one (polyphase wake)",
            retry_after_s=5,
            request_id=request.request_id,
        )


class Stalled:
    is_lasting = True

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        views = workers.standings.views
        return [row for row in rows if not views[row].facts.is_stalled]

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        return NoWorkers(
            f"{every(worker_count)} of the model {request.model!r} stands still; retry when one makes progress again",
            retry_after_s=5,
            request_id=request.request_id,
        )


class Excluded:
    """were tried for this request in vain"""

    is_lasting = True

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        if not request.excluded:
            return rows
        return [row for row in rows if workers.worker_ids[row] not in request.excluded]

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        return NoWorkers(
            f"{every(worker_count)} of the model {request.model!r} was tried for this request and failed", request_id=request.request_id
        )


class RequiredLabels:
    """do not carry a label that the request requires"""

    is_lasting = True

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        if not request.required_labels:
            return rows
        differing = workers.standings.differing_labels(request.required_labels)
        return [row for row in rows if not differing[row]]

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        wanted = ", ".join(f"{name}={value}" for name, value in sorted(request.required_labels.items()))
        return NoWorkers(
            f"{every(worker_count)} of the model {request.model!r} lacks a required label; wanted: {wanted}",
            retry_after_s=5,
            request_id=request.request_id,
        )


class FitsRole:
    """are not for this leg

    Prefill workers serve whole requests when nobody else is there: better a mixed worker than a refused request.
    """

    is_lasting = True

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        views = workers.standings.views
        others = [row for row in rows if views[row].facts.role is not Role.PREFILL]
        if leg is Leg.BOTH:
            return [row for row in others if views[row].facts.serves_whole] or [row for row in rows if views[row].facts.serves_whole]
        if leg is Leg.DECODE:
            return others or [row for row in rows if views[row].facts.serves_whole]
        kinds = {views[row].facts.offer_kind for row in others}
        return [row for row in rows if _can_hand_over_to(kinds, views[row].facts)]

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        return NoWorkers(f"no worker of the model {request.model!r} has a fitting role", retry_after_s=5, request_id=request.request_id)


class Taker:
    """take no offer of the worker that computes the prompt"""

    is_lasting = False

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        partner, standings = workers.partner, workers.standings
        if partner is None or len(standings.offer_kinds) == 1:
            return rows
        return [row for row in rows if standings.views[row].facts.offer_kind == partner.offer_kind]

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        return NoWorkers(f"{every(worker_count)} of the model {request.model!r} takes KV of another kind", request_id=request.request_id)


class Full:
    """run and queue as many requests of this router as they may"""

    is_lasting = False

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        full = workers.standings.full_rows
        return [row for row in rows if row not in full] if full else rows

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        return Overloaded(
            f"{every(worker_count)} of the model {request.model!r} runs and queues as many requests as it may; retry later",
            retry_after_s=2,
            request_id=request.request_id,
        )


def _can_hand_over_to(kinds: Collection[str], facts: WorkerFacts) -> bool:
    return facts.role is Role.PREFILL and facts.can_hand_over and facts.offer_kind in kinds


def no_worker_serves(request: RouteRequest) -> Refused:
    return NoWorkers(
        f"no worker serves the model {request.model!r} at the moment; retry when one has joined",
        retry_after_s=5,
        request_id=request.request_id,
    )


def every(count: int) -> str:
    return "the only worker" if count == 1 else f"each of the {count} workers"
