"""An engine that is a server elsewhere: one task and connection for each request, their chunks gathered into step reports.

    submit ──► Flight ── task: POST, chunks ──► flight.take ─┐
    abort  ──► task cancelled, connection closed             ├──► run: one StepReport for all that came since the last
    observers (KV events, metrics) ──────────────────────────┤
    forward ──► Passages: bodies there, answers back ────────┘

The server frees a request when its connection closes, so an abort needs no message of its own. A server that hangs is seen by its steps:
they count only what it did, and a worker whose steps stand still while requests run is quarantined by its frontends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import httpx
import msgspec

from polyphase.core.errors import ContextLengthExceeded, EngineFailed, InvalidRequest, Overloaded, PolyphaseError
from polyphase.engines.batching.admission import check_grammar
from polyphase.engines.batching.stopping import StopLimits
from polyphase.engines.interface import BlockSource, StepReport
from polyphase.engines.served.access import Access, Passes
from polyphase.engines.served.dialect import Dialect, Gauges, Observer
from polyphase.engines.served.flight import Flight, flight_of
from polyphase.engines.served.gate import Gate, retry_after_s
from polyphase.engines.served.passages import Passages
from polyphase.engines.served.process import ServerProcess
from polyphase.engines.served.sse import event_data
from polyphase.engines.served.tally import Tally
from polyphase.text import Tokenizer
from polyphase.wire.cards import ModelCard
from polyphase.wire.events import KvEvent, Load
from polyphase.wire.kv import KvOffer
from polyphase.wire.requests import FinishReason, Forward, Submit

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
WRITE_TIMEOUT_S = 30.0
_CHECK_INTERVAL_S = 0.1
_LAST_WORDS_S = 0.5  # after a connection broke, until the server has ended too
_SAID_ENOUGH_BYTES = 4096  # of an error's body


class ServedEngine:
    """Implements `engines.interface.Engine`. Owner of `server`, if there is one: it ends with `close`."""

    def __init__(
        self,
        card: ModelCard,
        tokenizer: Tokenizer | None,
        url: str,
        dialect: Dialect | None,
        observers: Sequence[Observer] = (),
        server: ServerProcess | None = None,
        *,
        passes: Passes | None = None,
        access: Access | None = None,
        gate: Gate | None = None,
    ) -> None:
        """`url`: of the server, without a slash at its end. `gate`: closed by what requests meet; whoever gives it sees to its opening."""
        self._card = card
        self._url = url
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
        self._released: list[KvOffer] = []
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
        if request.offer is not None:
            self._released.append(request.offer)  # a stock engine computes the prompt itself
        flight = flight_of(request, self._limits)
        self._flights[request.request_id] = flight
        self._tally.note_accepted()
        if self._tasks is not None:
            self._start(flight, self._tasks)
        self._news.set()

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

    def hand_over(self, request_id: str) -> None:
        self._passages.leave(request_id, FinishReason.HANDED_OVER)
        flight = self._flights.get(request_id)
        if flight is not None and not flight.request.hand_over:
            self._leave(request_id, FinishReason.HANDED_OVER)

    def load(self) -> Load:
        load = self._tally.load(self._flights.values())
        outage = self._gate.outage if self._gate is not None else ""
        if not self._passages and not outage:
            return load
        return msgspec.structs.replace(
            load,
            running_count=max(load.running_count, len(self._flights) + len(self._passages) - load.waiting_count),
            waiting_prefill_tokens=load.waiting_prefill_tokens + self._passages.waiting_tokens,
            outage=outage,
        )

    async def run(self, on_step: Callable[[StepReport], None]) -> None:
        """Raises: EngineFailed if the server has ended.

        Cancel: connections are closed, and what ran is forgotten: the caller answers for it.
        """
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S, write=WRITE_TIMEOUT_S)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        try:
            async with (
                httpx.AsyncClient(base_url=self._url, timeout=timeout, limits=limits, trust_env=self._access.uses_proxies) as self._client,
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
            self._passages.clear()

    async def _report_all(self, on_step: Callable[[StepReport], None]) -> None:
        while True:
            await self._news.wait()
            await asyncio.sleep(0)  # what arrived at the same time goes into the same report
            self._news.clear()
            on_step(self._take_report())

    def _take_report(self) -> StepReport:
        changed, events, released = self._changed, self._events, self._released
        self._changed, self._events, self._released = {}, [], []
        outputs = [flight.take_output() for flight in changed.values()] + self._passages.take_outputs()
        for output in outputs:
            self._tally.note_passed(output)
        if any(output.token_ids or output.passed for output in outputs):
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
        try:
            await self._exchange(flight)
        except PolyphaseError as error:
            flight.fail(error)
        except httpx.HTTPError as error:
            said = await self._why_broken(error)
            if self._gate is not None:
                self._gate.note_failure(said, time.monotonic())
            flight.fail(EngineFailed(said))
        except Exception:  # the root of this request's work: it gets its answer, and the others go on
            log.exception("the answer of %s to %s cannot be handled", self._card.engine, flight.request_id)
            flight.fail(EngineFailed(f"the answer of {self._card.engine} could not be handled"))
        self._note_changed(flight)

    async def _exchange(self, flight: Flight) -> None:
        assert self._client is not None
        assert self._dialect is not None
        body = self._dialect.body(flight.request, flight.max_tokens)
        headers = {"content-type": "application/json", "x-request-id": flight.request_id, **self._access.headers()}
        async with self._client.stream("POST", self._dialect.path, content=body, headers=headers) as response:
            if response.status_code != 200:
                raise self._refusal(response, self._access.hide(await _body_start(response)))
            finish: str | None = None
            async for data in event_data(response.aiter_bytes()):
                chunk = self._dialect.read(data)
                if chunk.error is not None:
                    raise chunk.error
                self._tally.note_tokens(flight, flight.take(chunk))
                finish = chunk.finish or finish
                if flight.is_whole and finish is None:
                    return  # by a stop string, which is ours to see: the closed connection ends it there
                if chunk.token_ids and not flight.is_whole:
                    self._note_changed(flight)
                if chunk.usage is not None and finish is not None:
                    break
            self._settle(flight, finish)

    async def _why_broken(self, error: httpx.HTTPError) -> str:
        """A server that has just died says more than the connection that died with it."""
        for _ in range(int(_LAST_WORDS_S / _CHECK_INTERVAL_S) if self._server is not None else 0):
            if self._server is not None and self._server.has_ended():
                return await asyncio.to_thread(self._server.why_ended)
            await asyncio.sleep(_CHECK_INTERVAL_S)
        return f"the connection to {self._card.engine} broke: {_said(error)}"

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


async def _body_start(response: httpx.Response) -> str:
    """The message in an error's body, or the body's beginning."""
    body = (await response.aread())[:_SAID_ENOUGH_BYTES]
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
