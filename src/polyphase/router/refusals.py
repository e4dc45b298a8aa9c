"""What follows from a worker's refusal: another choice, with its true load.

    full      left out of routing until its next load report, or for `FULL_FOR_NS`, as if it had no headroom; then the router judges anew
    busier    more waits there than this router believed when it chose: it chooses once more, by what is true; perhaps the same one
    draining  and another role than was known: not this one again before the registry's news is here, which is the dispatcher's care

The choice is this router's and the reservation the worker's, atomic there: so several routers do not herd on one worker. Each refusal
of the second kind means that somebody else's request was taken in the meantime; after some of them a request is taken as it comes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from polyphase.core.errors import Busier, Draining, NoWorkers, Overloaded, RoleChanged
from polyphase.core.ids import WorkerId
from polyphase.router.types import Placement, Route, RouteRequest

FULL_FOR_NS = 1_000_000_000
CHOICES = 8  # that may turn out to have been made on too little knowledge; each costs a message there and back


def is_refusal(code: str) -> bool:
    """Whether a failure of this code asks for another choice, and nothing is lost."""
    return code in (Overloaded.code, Busier.code, Draining.code, RoleChanged.code)


def believed_tokens(place: Placement, attempts: int) -> int | None:
    """What to tell the worker with a request that is sent for the `attempts`-th time."""
    return place.queued_prefill_tokens if attempts <= CHOICES else None


class Refusals:
    """One router's."""

    def __init__(self) -> None:
        self._full: dict[WorkerId, int] = {}  # until when that is believed

    def note(self, worker_id: WorkerId, code: str, now_ns: int) -> None:
        if code == Overloaded.code:
            self._full[worker_id] = now_ns + FULL_FOR_NS

    def forget(self, worker_id: WorkerId) -> None:
        """Its load is known again, or it is another life of the worker."""
        self._full.pop(worker_id, None)

    def has_headroom(self, has_headroom: Callable[[RouteRequest], bool], request: RouteRequest, now_ns: int) -> bool:
        """Whether a worker that did not refuse has it; `has_headroom` is the router's. Raises: NoWorkers."""
        if not has_headroom(request):
            return False
        full = self._believed_full(now_ns)
        if not full:
            return True
        try:
            return has_headroom(replace(request, excluded=request.excluded | full))
        except NoWorkers:
            return False

    def route(
        self,
        route: Callable[[RouteRequest], Route],
        request: RouteRequest,
        now_ns: int,
        has_headroom: Callable[[RouteRequest], bool] | None = None,
    ) -> Route:
        """Both are the router's; the second tells where no worker would do from where only workers that refused are left.

        Raises: NoWorkers; Overloaded, also when only workers that refused are left.
        """
        full = self._believed_full(now_ns)
        if not full:
            return route(request)
        try:
            return route(replace(request, excluded=request.excluded | full))
        except NoWorkers:
            if full <= request.excluded:
                raise
            if has_headroom is not None:
                has_headroom(request)  # raises NoWorkers
        names = ", ".join(sorted(full - request.excluded))
        raise Overloaded(f"no worker has room; refused by {names} a moment ago", retry_after_s=2, request_id=request.request_id)

    def _believed_full(self, now_ns: int) -> set[WorkerId]:
        return {worker_id for worker_id, until_ns in self._full.items() if until_ns > now_ns} if self._full else set()
