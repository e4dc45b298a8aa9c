"""Which workers refused a moment ago, and routing around them.

    refusal ─► left out of routing ─► its next load report, or `FULL_FOR_NS` later: the router judges anew

A refusal is the worker's answer from a true load, so it outweighs what this router believes; but it is about an instant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from polyphase.core.errors import NoWorkers, Overloaded
from polyphase.core.ids import WorkerId
from polyphase.router.types import Route, RouteRequest

FULL_FOR_NS = 1_000_000_000


class Refusals:
    """One router's."""

    def __init__(self) -> None:
        self._full: dict[WorkerId, int] = {}  # until when that is believed

    def note(self, worker_id: WorkerId, now_ns: int) -> None:
        self._full[worker_id] = now_ns + FULL_FOR_NS

    def forget(self, worker_id: WorkerId) -> None:
        """Its load is known again, or it is another life of the worker."""
        self._full.pop(worker_id, None)

    def route(self, route: Callable[[RouteRequest], Route], request: RouteRequest, now_ns: int) -> Route:
        """`route` is the router's. Raises: NoWorkers; Overloaded, also when only workers that refused are left."""
        if not self._full:
            return route(request)
        full = {worker_id for worker_id, until_ns in self._full.items() if until_ns > now_ns}
        try:
            return route(replace(request, excluded=request.excluded | full))
        except NoWorkers:
            if full <= request.excluded:
                raise
        names = ", ".join(sorted(full - request.excluded))
        raise Overloaded(f"no worker has room; refused by {names} a moment ago", retry_after_s=2, request_id=request.request_id)
