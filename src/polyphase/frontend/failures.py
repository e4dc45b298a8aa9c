"""Errors that arrive from another process, as errors of this one."""

from __future__ import annotations

from polyphase.core.errors import EngineFailed, Lost, Overloaded, PolyphaseError, Refused, WorkerLost
from polyphase.wire.requests import WireFailure


def _by_code(root: type[PolyphaseError]) -> dict[str, type[PolyphaseError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_by_code(child))
    return found


def error_of(failure: WireFailure | None) -> PolyphaseError:
    """The error that a worker reported; an unknown code is the engine's failure."""
    if failure is None:
        return EngineFailed("the worker ended the request without saying why")
    return _by_code(PolyphaseError).get(failure.code, EngineFailed)(failure.message)


def lost_for_want_of_room(cause: PolyphaseError, refusal: Refused) -> PolyphaseError:
    """What to tell when a sequence was broken off for `cause`, and `refusal` kept it from going on elsewhere."""
    kind = type(cause) if isinstance(cause, Lost) else WorkerLost
    what = "is full" if isinstance(refusal, Overloaded) else "is left to go on with it"
    return kind(f"{cause.message}, and no other worker {what}: {refusal.message}")
