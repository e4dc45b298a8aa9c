"""An engine that is a server elsewhere: one task and connection for each request, their chunks gathered into step reports.

    submit ──► Flight ── task: POST, chunks ──► flight.take ─┐
    abort  ──► task cancelled, connection closed             ├──► run: one StepReport for all that came since the last
    observers (KV events, metrics) ──────────────────────────┤
    forward ──► Passages: bodies there, answers back ────────┘

The server frees a request when its connection closes, so an abort needs no message of its own, but for servers that notice it late
(`AbortDialect`). A server that hangs is seen by its steps: they count only what it did, and a worker whose steps stand still while requests
run is quarantined by its frontends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx
import msgspec

from polyphase.core.clock import MonotonicClock
from polyphase.core.errors import ContextLengthExceeded, EngineFailed, InvalidRequest, Overloaded, PolyphaseError
from polyphase.engines.batching.admission import check_grammar
from polyphase.engines.batching.stopping import StopLimits
from polyphase.engines.interface import BlockSource, StepReport
from polyphase.engines.served.access import Access, Passes
from polyphase.engines.served.dialect import AbortDialect, Dialect, Gauges, Observer, PrefillDialect, SleepPaths
from polyphase.engines.served.flight import Flight, flight_of
from polyphase.engines.served.gate import Gate, retry_after_s
from polyphase.engines.served.offers import OpenOffers
from polyphase.engines.served.passages import Passages
from polyphase.engines.served.process import ServerProcess
from polyphase.engines.served.sse import event_data
from polyphase.engines.served.tally import Tally
from polyphase.text import Tokenizer
from polyphase.wire.cards import ModelCard
from polyphase.wire.events import AllCleared, KvEvent, Load
from polyphase.wire.kv import EngineOffer, Offer
from polyphase.wire.requests import FinishReason, Forward, Submit

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
WRITE_TIMEOUT_S = 30.0
_ABORT_TIMEOUT_S = 5.0
_CHECK_INTERVAL_S = 0.1
_FETCHING_INTERVAL_S = 0.5
_SLEEP_TIMEOUT_S = 300.0  # weights go to host memory and back
_LAST_WORDS_S = 0.5  # after a connection broke, until the server has ended too
_SAID_ENOUGH_BYTES = 4096  # of an error's body


class ServedEngine:
    """Implements `engines.interface.Engine`, and `KvSender` with a `prefill` dialect. Owner of `server`, if any: it ends with `close`."""

    def __init__(
        self,
        card: ModelCard,
        tokenizer: Tokenizer | None,
        url: str,
        dialect: Dialect | None,
        observers: Sequence[Observer] = (),
        server: ServerProcess | None = None,
        *,
        prefill: PrefillDialect | None = None,
        headers: Mapping[str, str] | None = None,
        sleep_paths: SleepPaths | None = None,
        passes: Passes | None = None,
        access: Access | None = None,
        gate: Gate | None = None,
    ) -> None:
        """
        Args:
            url: of the server, without a slash at its end.
            prefill: for servers that bring KV to others; the card says so too.
            headers: of each request to the server.
            gate: closed by what requests meet; whoever gives it sees to its opening.
        """
        self._card = card
        self._url = url
        self._headers = dict(headers or {})
        self._sleep_paths = sleep_paths
        self._clock = MonotonicClock()
        self._dialect = dialect
        self._observers = observers
        self._server = server
        self._access = access or Access()
        self._gate = gate
        self._limits = StopLimits(frozenset(card.eos_token_ids), card.context_length, tokenizer) if tokenizer is not None else None
        own_passes = passes or Passes(card.name)
        self._passages = Passages(own_passes, self._access, card.engine, gate or Gate(), self._note_news)
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
        if self._dialect is None or self._limits is None:
            raise InvalidRequest(f"{self._card.engine} takes no tokens here, only bodies", request_id=request.request_id)
        self._refuse_if_closed()
        if len(request.token_ids) >= self._card.context_length:
            raise ContextLengthExceeded(
                f"the request has {len(request.token_ids)} tokens; with one of output at least, it takes {self._card.context_length}",
                request_id=request.request_id,
            )
        check_grammar(request, self._card)
        if request.offer is not None and not self._takes(request.offer):
            self._released.append(request.offer)  # and computes the prompt itself
            request = msgspec.structs.replace(request, offer=None)
        flight = flight_of(request, self._limits, self._clock.now_ns())
        self._flights[request.request_id] = flight
        self._tally.note_accepted()
        if self._tasks is not None:
            self._start(flight, self._tasks)
        self._news.set()

    def _takes(self, offer: Offer) -> bool:
        return isinstance(offer, EngineOffer) and self._prefill is not None and offer.kind == self._card.offer_kind

    def forward(self, request: Forward) -> None:
        if self._tasks is None or self._client is None:
            raise Overloaded("the engine does not run yet", request_id=request.request_id)
        self._refuse_if_closed()
        self._tally.note_accepted()
        self._passages.start(request, self._client, self._tasks, self._why_broken)

    def read_on(self, request_id: str, byte_count: int) -> None:
        self._passages.read_on(request_id, byte_count)

    def _refuse_if_closed(self) -> None:
        if self._gate is not None:
            self._gate.refuse_if_closed(time.monotonic())

    def abort(self, request_id: str) -> None:
        self._passages.leave(request_id, FinishReason.CANCELLED)
        self._leave(request_id, FinishReason.CANCELLED)
        self._offers.release_request(request_id)

    def hand_over(self, request_id: str) -> None:
        self._passages.leave(request_id, FinishReason.HANDED_OVER)
        flight = self._flights.get(request_id)
        if flight is not None and not flight.request.hand_over:
            self._leave(request_id, FinishReason.HANDED_OVER)

    def load(self) -> Load:
        load = self._tally.load(self._flights.values(), self._offers.block_count(), self._offers.computing_token_count())
        outage = self._gate.outage if self._gate is not None else ""
        if not self._passages and not outage:
            return load
        return msgspec.structs.replace(
            load,
            running_count=max(load.running_count, len(self._flights) + len(self._passages) - load.waiting_count),
            waiting_prefill_tokens=load.waiting_prefill_tokens + self._passages.waiting_tokens,
            outage=outage,
        )

    # Implements `Sleeper`

    async def sleep(self) -> None:
        assert self._sleep_paths is not None
        await self._tell(self._sleep_paths.sleep)
        self.note_events([AllCleared()])  # the server says so too, but only with its next step

    async def wake(self) -> None:
        assert self._sleep_paths is not None
        await self._tell(self._sleep_paths.wake)

    async def _tell(self, path: str) -> None:
        if self._client is None:
            raise EngineFailed(f"{self._card.engine} is not running")
        try:
            response = await self._client.post(path, headers=self._access.headers(), timeout=_SLEEP_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise EngineFailed(f"{self._card.engine} does not answer {path}: {_said(error)}") from error
        if response.status_code != 200:
            raise error_of_status(response.status_code, _message_in(response.content), self._card.engine)

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
                if self._prefill is not None:
                    self._tasks.create_task(self._count_fetching(), name="fetching")
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
            self._passages.clear()

    def _new_client(self) -> httpx.AsyncClient:
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S, write=WRITE_TIMEOUT_S)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        proxies = self._access.uses_proxies
        return httpx.AsyncClient(base_url=self._url, headers=self._headers, timeout=timeout, limits=limits, trust_env=proxies)

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
        outputs += self._passages.take_outputs()
        for output in outputs:
            self._tally.note_passed(output)
        if any(output.token_ids or output.offer or output.passed for output in outputs):
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
            said = await self._why_broken(error)
            if self._gate is not None:
                self._gate.note_failure(said, time.monotonic())
            flight.fail(EngineFailed(said))
        except Exception:  # the root of this request's work: it gets its answer, and the others go on
            log.exception("the answer of %s to %s cannot be handled", self._card.engine, flight.request_id)
            flight.fail(EngineFailed(f"the answer of {self._card.engine} could not be handled"))
        finally:
            if not has_answered:
                self._end_there(flight)
        self._note_changed(flight)

    def _end_there(self, flight: Flight) -> None:
        """The server may still compute what nobody awaits."""
        dialect: object = self._dialect
        if not isinstance(dialect, AbortDialect) or self._tasks is None:
            return
        saying = self._say_abort(dialect, flight)
        try:
            self._tasks.create_task(saying, name=f"abort-{flight.request_id}")
        except RuntimeError:  # we are ending: the server ends as well, or finds out by itself
            saying.close()

    async def _say_abort(self, dialect: AbortDialect, flight: Flight) -> None:
        assert self._client is not None
        body = dialect.abort_body(flight.request)
        try:
            await self._client.post(dialect.abort_path, content=body, headers=self._headers_of(flight), timeout=_ABORT_TIMEOUT_S)
        except httpx.HTTPError as error:
            log.debug("%s cannot be told that %s is over: %s", self._card.engine, flight.request_id, _said(error))

    async def _compute_for_others(self, flight: Flight, dialect: PrefillDialect) -> None:
        """A prefill leg, at whose end this server keeps the KV for another one."""
        assert self._client is not None
        early_params = dialect.early_params(flight.request)
        if early_params is not None:
            self._hand_over(flight, early_params)
        body = dialect.prefill_body(flight.request, early_params)
        assert self._dialect is not None
        response = await self._client.post(self._dialect.path, content=body, headers=self._headers_of(flight))
        if response.status_code != 200:
            raise self._refusal(response, self._access.hide(_message_in(response.content)))
        chunk = dialect.read_prefill(response.content)
        if chunk.error is not None:
            raise chunk.error
        if early_params is not None:
            self._tally.note_usage(chunk.usage)
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
        assert self._dialect is not None
        body = self._dialect.body(flight.request, flight.max_tokens)
        async with self._client.stream("POST", self._dialect.path, content=body, headers=self._headers_of(flight)) as response:
            if response.status_code != 200:
                raise self._refusal(response, self._access.hide(_message_in(await response.aread())))
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

    def _headers_of(self, flight: Flight) -> dict[str, str]:
        return {"content-type": "application/json", "x-request-id": flight.request_id, **self._access.headers()}

    def _refusal(self, response: httpx.Response, said: str) -> PolyphaseError:
        status, now_s = response.status_code, time.monotonic()
        error = error_of_status(status, said, self._card.engine)
        if self._gate is not None and isinstance(error, Overloaded):
            self._gate.note_full(retry_after_s(response.headers.get("retry-after")), now_s)
        elif self._gate is not None and status >= 500:
            self._gate.note_failure(error.message, now_s)
        return error

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
            if flight.token_count:
                self._tally.note_transfer(flight.taken_offer.token_count)
                flight.note_taken(flight.taken_offer, (self._clock.now_ns() - flight.began_ns) / 1e6)
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

    async def _count_fetching(self) -> None:
        """KV on its way here is work of the server's, in which it makes no steps, and which comes to an end with the offer's lease."""
        while True:
            await asyncio.sleep(_FETCHING_INTERVAL_S)
            if self._is_fetching():
                self._tally.note_step()
                self._news.set()

    def _is_fetching(self) -> bool:
        """Whether nothing else runs there."""
        offers = [flight.taken_offer for flight in self._flights.values()]
        now_ns = self._clock.now_ns()
        return bool(offers) and all(offer is not None and now_ns < offer.expires_at_ns for offer in offers)

    def note_alive(self) -> None:
        """The server answers. What is passed through tells no steps: while some of it is awaited, that is all the progress to be seen."""
        if self._passages:
            self._tally.note_step()
        self._news.set()

    def _note_news(self) -> None:
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
