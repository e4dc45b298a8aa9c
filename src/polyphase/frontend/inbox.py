"""What arrives from workers for one HTTP request, until its writer has time for it.

A slow client makes arrivals merge here: the writer takes all of them at once and writes once. Bound: what the request may produce
(its sequences times max_tokens); the workers stop by themselves there. Of an answer that is passed through, it is the request's window.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from polyphase.core.errors import PolyphaseError
from polyphase.wire.requests import FinishReason, Passed, TokenLogprob


@dataclass(frozen=True, slots=True)
class End:
    """How a sequence ended: with a finish reason or with an error."""

    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: PolyphaseError | None = None


def how_it_ended(end: End) -> str:
    """For the request's history."""
    return f"error: {end.error.message}" if end.error is not None else str(end.finish_reason)


@dataclass(slots=True)
class Arrival:
    """New tokens of one sequence, and its end if it has come. `index` is the choice. Owner of the lists: this."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    end: End | None = None
    passed: Passed | None = None

    def merge(self, later: Arrival) -> None:
        self.passed = _joined(self.passed, later.passed)
        self.token_ids.extend(later.token_ids)
        self.logprobs.extend(later.logprobs)
        self.end = later.end


def _joined(first: Passed | None, second: Passed | None) -> Passed | None:
    if first is None or second is None:
        return first or second
    return Passed(
        data=first.data + second.data,
        status=first.status or second.status,
        content_type=first.content_type or second.content_type,
        usage=second.usage or first.usage,
    )


class Inbox:
    """Many put, one takes."""

    def __init__(self) -> None:
        self._arrivals: dict[int, Arrival] = {}
        self._waiter: asyncio.Future[None] | None = None

    def put(self, arrival: Arrival) -> None:
        waiting = self._arrivals.get(arrival.index)
        if waiting is None:
            self._arrivals[arrival.index] = arrival
        else:
            waiting.merge(arrival)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Arrival]:
        """All that came since the last call, one per sequence; waits for the first. Cancel: nothing is lost."""
        while not self._arrivals:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        arrivals, self._arrivals = list(self._arrivals.values()), {}
        return arrivals
