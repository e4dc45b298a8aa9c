"""An engine that is a server elsewhere: one task and connection for each request, their chunks gathered into step reports.

    submit ──► Flight ── task: POST, chunks ──► flight.take ─┐
    abort  ──► task cancelled, connection closed             ├──► run: one StepReport for all that came since the last
    observers (KV events, metrics) ──────────────────────────┘

The server frees a request when its connection closes, so an abort needs no message of its own, but for servers that notice it late
(`AbortDialect`). A server that hangs is seen by its steps: they count only what it did, and a worker whose steps stand still while requests
run is quarantined by its frontends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx
import msgspec

from polyphase.core.errors import ContextLengthExceeded, EngineFailed, InvalidRequest, Overloaded, PolyphaseError
from polyphase.engines.batching.stopping import StopLimits
from polyphase.engines.interface import BlockSource, StepReport
from polyphase.engines.served.dialect import AbortDialect, Dialect, Gauges, Observer, PrefillDialect
from polyphase.engines.served.flight import Flight, flight_of
from polyphase.engines.served.offers import OpenOffers
from polyphase.engines.served.process import ServerProcess
from polyphase.engines.served.sse import event_data
from polyphase.engines.served.tally import Tally
from polyphase.text import Tokenizer
from polyphase.wire.cards import ModelCard
from polyphase.wire.events import KvEvent, Load
from polyphase.wire.kv import EngineOffer, Offer
from polyphase.wire.requests import FinishReason, Submit

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
WRITE_TIMEOUT_S = 30.0
_ABORT_TIMEOUT_S = 5.0
_CHECK_INTERVAL_S = 0.1
_LAST_WORDS_S = 0.5  # after a connection broke, until the server has ended too
_SAID_ENOUGH_BYTES = 4096  # of an error's body


class ServedEngine:
    """Implements `engines.interface.Engine`, and `KvSender` with a `prefill` dialect. Owner of `server`, if any: it ends with `close`."""

    def __init__(
        self,
        card: ModelCard,
        tokenizer: Tokenizer,
        url: str,
        dialect: Dialect,
        observers: Sequence[Observer] = (),
        server: ServerProcess | None = None,
        prefill: PrefillDialect | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            url: of the server, without a slash at its end.
            prefill: for servers that bring KV to others; the card says so too.
            headers: sent with everything, such as an API key.
        """
        self._headers = dict(headers or {})
        self._card = card
        self._url = url
        self._dialect = dialect
        self._observers = observers
        self._server = server
        self._limits = StopLimits(frozenset(card.eos_token_ids), card.context_length, tokenizer)
        self._flights: dict[str, Flight] = {}
        self._changed: dict[str, Flight] = {}  # with something to report
        self._events: list[KvEvent] = []
        self._released: list[Offer] = []
        self._prefill = prefill
        self._offers = OpenOffers(card.offer_kind, prefill.lease_s if prefill is not None else 0.0, card.block_size)
        self._tally = Tally(card.block_count)
        self._news = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None  # while `run` is active
        self._client: httpx.AsyncClient | None = None

    @property
    def card(self) -> ModelCard:
        return self._card

    def submit(self, request: Submit, source: BlockSource | None = None) -> None:
        if len(request.token_ids) >= self._card.context_length:
            raise ContextLengthExceeded(
                f"the request has {len(request.token_ids)} tokens; with one of output at least, it takes {self._card.context_length}",
                request_id=request.request_id,
            )
        if request.offer is not None and not self._takes(request.offer):
            self._released.append(request.offer)  # and computes the prompt itself
            request = msgspec.structs.replace(request, offer=None)
        flight = flight_of(request, self._limits)
        self._flights[request.request_id] = flight
        self._tally.note_accepted()
        if self._tasks is not None:
            self._start(flight, self._tasks)
        self._news.set()

    def _takes(self, offer: Offer) -> bool:
        return isinstance(offer, EngineOffer) and self._prefill is not None and offer.kind == self._card.offer_kind

    def abort(self, request_id: str) -> None:
        self._leave(request_id, FinishReason.CANCELLED)
        self._offers.release_request(request_id)

    def hand_over(self, request_id: str) -> None:
        flight = self._flights.get(request_id)
        if flight is not None and not flight.request.hand_over:
            self._leave(request_id, FinishReason.HANDED_OVER)

    def load(self) -> Load:
        return self._tally.load(self._flights.values(), self._offers.block_count())

    # Implements `KvSender`

    def bind_offers(self, *, worker_id: str, epoch: int, endpoint: str) -> None:
        self._offers.bind(worker_id, epoch, endpoint)

    def release_lease(self, lease_id: str) -> None:
        self._offers.release(lease_id)

    async def run(self, on_step: Callable[[StepReport], None]) -> None:
        """Raises: EngineFailed if the server has ended.

        Cancel: connections are closed, and what ran is forgotten: the caller answers for it.
        """
        try:
            async with (
                self._new_client() as self._client,
                asyncio.TaskGroup() as self._tasks,
            ):
                for observer in self._observers:
                    self._tasks.create_task(observer.watch(self._client, self), name=type(observer).__name__)
                if self._server is not None:
                    self._tasks.create_task(self._watch_server(self._server), name="server")
                for flight in self._flights.values():
                    self._start(flight, self._tasks)
                await self._report_all(on_step)
        except BaseExceptionGroup as group:
            raise _first_failure(group) from None
        finally:
            self._tasks = self._client = None
            self._flights.clear()
            self._changed.clear()
            self._offers.clear()

    def _new_client(self) -> httpx.AsyncClient:
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S, write=WRITE_TIMEOUT_S)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        return httpx.AsyncClient(base_url=self._url, headers=self._headers, timeout=timeout, limits=limits, trust_env=False)

    async def _report_all(self, on_step: Callable[[StepReport], None]) -> None:
        while True:
            await self._news.wait()
            await asyncio.sleep(0)  # what arrived at the same time goes into the same report
            self._news.clear()
            on_step(self._take_report())

    def _take_report(self) -> StepReport:
        changed, events, released = self._changed, self._events, self._released
        self._changed, self._events, self._released = {}, [], []
        outputs = [flight.take_output(has_ended=self._flights.get(name) is not flight) for name, flight in changed.items()]
        if any(output.token_ids or output.offer for output in outputs):
            self._tally.note_step()
        return StepReport(self._tally.step, outputs, events, released)

    def close(self) -> None:
        if self._server is not None:
            self._server.stop()

    # One request

    def _start(self, flight: Flight, tasks: asyncio.TaskGroup) -> None:
        flight.task = tasks.create_task(self._fly(flight), name=f"served-{flight.request_id}")

    def _leave(self, request_id: str, reason: FinishReason) -> None:
        flight = self._flights.get(request_id)
        if flight is None:
            return
        if flight.task is not None:
            flight.task.cancel()
        flight.end(reason)
        self._note_changed(flight)

    async def _fly(self, flight: Flight) -> None:
        """However it ends, the flight has its terminal output. Cancel: whoever cancels says how it ends."""
        has_answered = False
        try:
            if flight.request.hand_over and self._prefill is not None:
                await self._compute_for_others(flight, self._prefill)
                has_answered = True
            else:
                has_answered = await self._exchange(flight)
        except PolyphaseError as error:
            if flight.is_whole:  # handed over already: the other leg fails of it, and is answered for
                log.warning("the prompt of %s was not computed for the other worker: %s", flight.request_id, error.message)
            flight.fail(error)
        except httpx.HTTPError as error:
            flight.fail(EngineFailed(await self._why_broken(error)))
        except Exception:  # the root of this request's work: it gets its answer, and the others go on
            log.exception("the answer of %s to %s cannot be handled", self._card.engine, flight.request_id)
            flight.fail(EngineFailed(f"the answer of {self._card.engine} could not be handled"))
        finally:
            if not has_answered:
                self._end_there(flight)
        self._note_changed(flight)

    def _end_there(self, flight: Flight) -> None:
        """The server may still compute what nobody awaits."""
        if not isinstance(self._dialect, AbortDialect) or self._tasks is None:
            return
        saying = self._say_abort(self._dialect, flight)
        try:
            self._tasks.create_task(saying, name=f"abort-{flight.request_id}")
        except RuntimeError:  # we are ending: the server ends as well, or finds out by itself
            saying.close()

    async def _say_abort(self, dialect: AbortDialect, flight: Flight) -> None:
        assert self._client is not None
        body = dialect.abort_body(flight.request)
        try:
            await self._client.post(dialect.abort_path, content=body, headers=_headers(flight), timeout=_ABORT_TIMEOUT_S)
        except httpx.HTTPError as error:
            log.debug("%s cannot be told that %s is over: %s", self._card.engine, flight.request_id, _said(error))

    async def _compute_for_others(self, flight: Flight, dialect: PrefillDialect) -> None:
        """A prefill leg, at whose end this server keeps the KV for another one."""
        assert self._client is not None
        early_params = dialect.early_params(flight.request)
        if early_params is not None:
            self._hand_over(flight, early_params)
        body = dialect.prefill_body(flight.request, early_params)
        response = await self._client.post(self._dialect.path, content=body, headers=_headers(flight))
        if response.status_code != 200:
            raise error_of_status(response.status_code, _message_in(response.content), self._card.engine)
        chunk = dialect.read_prefill(response.content)
        if chunk.error is not None:
            raise chunk.error
        if early_params is not None:
            return
        self._tally.note_tokens(flight, flight.take(chunk))
        if chunk.offer_params is not None:
            self._hand_over(flight, chunk.offer_params)
        self._settle(flight, chunk.finish)

    def _hand_over(self, flight: Flight, params: dict[str, Any]) -> None:
        if not flight.is_whole or flight.finish is FinishReason.HANDED_OVER:
            flight.made_offer = self._offers.make(flight.request, params, flight.task)
            flight.end(FinishReason.HANDED_OVER)
            if not flight.token_count:
                self._tally.note_prefill(flight)
            self._note_changed(flight)

    async def _exchange(self, flight: Flight) -> bool:
        """Returns: whether the server had done with it, too."""
        assert self._client is not None
        body = self._dialect.body(flight.request, flight.max_tokens)
        async with self._client.stream("POST", self._dialect.path, content=body, headers=_headers(flight)) as response:
            if response.status_code != 200:
                raise error_of_status(response.status_code, _message_in(await response.aread()), self._card.engine)
            finish: str | None = None
            async for data in event_data(response.aiter_bytes()):
                chunk = self._dialect.read(data)
                if chunk.error is not None:
                    raise chunk.error
                self._tally.note_tokens(flight, flight.take(chunk))
                finish = chunk.finish or finish
                if flight.is_whole and finish is None:
                    return False  # by a stop string, which is ours to see
                if chunk.token_ids and not flight.is_whole:
                    self._note_changed(flight)
                if chunk.usage is not None and finish is not None:
                    break
            self._settle(flight, finish)
            return True

    async def _why_broken(self, error: httpx.HTTPError) -> str:
        """A server that has just died says more than the connection that died with it."""
        for _ in range(int(_LAST_WORDS_S / _CHECK_INTERVAL_S) if self._server is not None else 0):
            if self._server is not None and self._server.has_ended():
                return await asyncio.to_thread(self._server.why_ended)
            await asyncio.sleep(_CHECK_INTERVAL_S)
        return f"the connection to {self._card.engine} broke: {_said(error)}"

    def _settle(self, flight: Flight, finish: str | None) -> None:
        """The stream has ended. Raises: EngineFailed if the sequence has not."""
        if flight.is_whole:
            return
        match finish:
            case "stop" | "repetition":
                flight.end(FinishReason.STOP)
            case "length":
                flight.end(FinishReason.LENGTH)
            case None:
                raise EngineFailed(f"{self._card.engine} ended its answer after {flight.token_count} tokens without saying why")
            case _:
                raise EngineFailed(f"{self._card.engine} broke the request off after {flight.token_count} tokens: {finish}")

    def _note_changed(self, flight: Flight) -> None:
        if flight.taken_offer is not None and (flight.token_count or flight.is_whole):
            self._released.append(flight.taken_offer)
            flight.taken_offer = None
        if flight.is_whole:
            if self._flights.pop(flight.request_id, None) is None:
                return
            self._tally.note_end(flight)
        self._changed[flight.request_id] = flight
        self._news.set()

    # From the server; implements `Sink`

    def note_events(self, events: Sequence[KvEvent]) -> None:
        self._events += events
        self._news.set()

    def note_gauges(self, gauges: Gauges) -> None:
        step = self._tally.step
        self._tally.note_gauges(gauges)
        if self._tally.step != step:
            self._news.set()

    async def _watch_server(self, server: ServerProcess) -> None:
        while not server.has_ended():  # noqa: ASYNC110  a process that a thread listens to has no event on this loop
            await asyncio.sleep(_CHECK_INTERVAL_S)
        raise EngineFailed(await asyncio.to_thread(server.why_ended))


def error_of_status(status: int, said: str, engine: str) -> PolyphaseError:
    """What an answer other than 200 means for the request."""
    if status in (429, 503):
        return Overloaded(f"{engine} takes no more requests now: {said or status}")
    if 400 <= status < 500:
        return InvalidRequest(f"{engine} refused the request: {said or status}")
    return EngineFailed(f"{engine} failed with status {status}: {said or 'no reason given'}")


def _headers(flight: Flight) -> dict[str, str]:
    return {"content-type": "application/json", "x-request-id": flight.request_id}


def _message_in(body: bytes) -> str:
    """The message in an error's body, or the body's beginning."""
    body = body[:_SAID_ENOUGH_BYTES]
    try:
        found = httpx.Response(200, content=body).json()
        error = found.get("error", found)
        return str(error.get("message") or error.get("detail") or error)
    except (ValueError, AttributeError):
        return body.decode(errors="replace").strip()


def _said(error: httpx.HTTPError) -> str:
    return str(error) or type(error).__name__


def _first_failure(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Several tasks may fail of one thing; what was raised on purpose says it best."""
    flat: list[BaseException] = []
    stack: list[BaseException] = [group]
    while stack:
        error = stack.pop()
        if isinstance(error, BaseExceptionGroup):
            stack += error.exceptions
        else:
            flat.append(error)
    return next((error for error in flat if isinstance(error, PolyphaseError)), flat[0])
