"""Which workers may take which leg of a request.

    role      whole request   decode leg   prefill leg
    both      yes             yes          no: it would decode there as well as anywhere
    decode    yes             yes          no
    prefill   only if alone   no           yes, if it can hand over

Draining workers, those that stand still, and those that a request was already tried on in vain take nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from polyphase.core.errors import NoWorkers, Overloaded
from polyphase.router.types import RouteRequest, WorkerFacts
from polyphase.wire.cards import Role


def available(request: RouteRequest, workers: Collection[WorkerFacts]) -> list[WorkerFacts]:
    """Workers that may take something of this request, in the order of their names.

    Raises: NoWorkers, saying why there are none.
    """
    serving = [facts for facts in workers if facts.model == request.model]
    if not serving:
        raise NoWorkers(
            f"no worker serves the model {request.model!r} at the moment; retry when one has joined",
            retry_after_s=5,
            request_id=request.request_id,
        )
    staying = [facts for facts in serving if not facts.is_draining]
    if not staying:
        raise NoWorkers(
            f"{_every(len(serving))} of the model {request.model!r} is draining; retry when another has joined",
            retry_after_s=5,
            request_id=request.request_id,
        )
    moving = [facts for facts in staying if not facts.is_stalled]
    if not moving:
        raise NoWorkers(
            f"{_every(len(staying))} of the model {request.model!r} stands still; retry when one makes progress again",
            retry_after_s=5,
            request_id=request.request_id,
        )
    untried = [facts for facts in moving if facts.worker_id not in request.excluded]
    if not untried:
        raise NoWorkers(
            f"{_every(len(moving))} of the model {request.model!r} was tried for this request and failed",
            request_id=request.request_id,
        )
    return sorted(untried, key=lambda facts: facts.worker_id)


def able_to_serve_whole(workers: Sequence[WorkerFacts]) -> list[WorkerFacts]:
    """Prefill workers step in when nobody else is there: better a mixed worker than a refused request."""
    return [facts for facts in workers if facts.role is not Role.PREFILL] or list(workers)


def able_to_prefill(workers: Sequence[WorkerFacts]) -> list[WorkerFacts]:
    """Empty unless somebody else is there to decode."""
    if all(facts.role is Role.PREFILL for facts in workers):
        return []
    return [facts for facts in workers if facts.role is Role.PREFILL and facts.can_hand_over]


def refuse_full(request: RouteRequest, worker_count: int, max_waiting_requests: int) -> Overloaded:
    return Overloaded(
        f"{_every(worker_count)} of the model {request.model!r} has {max_waiting_requests} requests waiting; retry later",
        retry_after_s=2,
        request_id=request.request_id,
    )


def _every(count: int) -> str:
    return "the only worker" if count == 1 else f"each of the {count} workers"
