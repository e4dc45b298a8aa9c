"""What a kind of engine server has to say for itself, so that `ServedEngine` can drive it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import httpx

from polyphase.core.errors import PolyphaseError
from polyphase.wire.events import KvEvent
from polyphase.wire.requests import Submit, TokenLogprob


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int | None  # of these, found in the prefix cache; None: the engine does not say


@dataclass(frozen=True, slots=True)
class Chunk:
    """One piece of a streamed answer. `is_whole`: its tokens and logprobs are all so far, not only those since the last piece."""

    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] = ()
    finish: str | None = None  # "stop", "length"; anything else is taken for a failure
    stop_reason: int | str | None = None
    usage: Usage | None = None
    is_whole: bool = False
    error: PolyphaseError | None = None
    offer_params: dict[str, Any] | None = None  # of a prefill leg: with these another server of the kind can go on


@dataclass(slots=True)
class Gauges:
    """What the engine measures of itself."""

    running_count: int = 0
    waiting_count: int = 0
    used_share: float = 0.0  # of its KV blocks
    iterations: int = 0  # steps since its start
    preemptions: int = 0


class Dialect(Protocol):
    """How a request is written, and an answer read."""

    @property
    def path(self) -> str: ...

    def body(self, request: Submit, max_tokens: int) -> bytes:
        """JSON for a streamed answer of at most `max_tokens` tokens behind `request.token_ids`."""

    def read(self, data: bytes) -> Chunk:
        """The data of one server-sent event. Raises: WireError."""


@runtime_checkable
class AbortDialect(Protocol):
    """How a request is ended by its name, at servers that notice only late that a connection has closed."""

    @property
    def abort_path(self) -> str: ...

    def abort_body(self, request: Submit) -> bytes:
        """JSON; the answer is not read."""


class PrefillDialect(Protocol):
    """How a prompt is computed for another server of the same kind, which then fetches the KV by itself.

    For the decode leg, a `Dialect` writes the params of `request.offer`.
    """

    @property
    def lease_s(self) -> float:
        """How long the server keeps what nobody fetches."""

    def early_params(self, request: Submit) -> dict[str, Any] | None:
        """For servers whose two legs have to run at the same time: what the other one has to know. None: that comes with the answer."""

    def prefill_body(self, request: Submit, early_params: dict[str, Any] | None) -> bytes:
        """JSON for an answer in one piece."""

    def read_prefill(self, body: bytes) -> Chunk:
        """That answer. With `offer_params`, its tokens are only those that the decode leg will not repeat; without, its one token.

        Raises: WireError.
        """


@dataclass(frozen=True, slots=True)
class SleepPaths:
    """Where a server is told to sleep and to wake, by POST."""

    sleep: str
    wake: str


class Sink(Protocol):
    """Where an observer brings what it saw; on the event loop."""

    def note_events(self, events: Sequence[KvEvent]) -> None: ...

    def note_gauges(self, gauges: Gauges) -> None: ...

    def note_alive(self) -> None:
        """The server answered a question that has nothing to do with its work, or the gate has changed."""


class Observer(Protocol):
    """Watches one side of a running server, such as its metrics or its KV events."""

    async def watch(self, client: httpx.AsyncClient, sink: Sink) -> None:
        """Until cancelled. Raises: EngineFailed if the server has gone."""
