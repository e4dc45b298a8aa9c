"""Workers that sent a request back a moment ago: until they report again, or for a while, nothing more is sent there."""

from __future__ import annotations

from dataclasses import replace

from polyphase.core.errors import NoWorkers, Overloaded
from polyphase.core.ids import WorkerId
from polyphase.router import Route, Router, RouteRequest

FULL_FOR_NS = 1_000_000_000


class FullWorkers:
    def __init__(self) -> None:
        self._until_ns: dict[WorkerId, int] = {}

    def note(self, worker_id: WorkerId, now_ns: int) -> None:
        self._until_ns[worker_id] = now_ns + FULL_FOR_NS

    def forget(self, worker_id: WorkerId) -> None:
        """Its load is known again, so the router judges; or it is another life of it."""
        self._until_ns.pop(worker_id, None)

    def route_around(self, router: Router, request: RouteRequest, now_ns: int) -> Route:
        """Raises: NoWorkers, Overloaded."""
        if not self._until_ns:
            return router.route(request)
        full = {worker_id for worker_id, until_ns in self._until_ns.items() if until_ns > now_ns}
        try:
            return router.route(replace(request, excluded=request.excluded | full))
        except NoWorkers:
            if full <= request.excluded:
                raise
        names = ", ".join(sorted(full - request.excluded))
        raise Overloaded(f"no worker has room; refused by {names} a moment ago", retry_after_s=2, request_id=request.request_id)
