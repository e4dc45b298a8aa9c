"""One request that is passed through: sent on its way, its answer written to the client as it comes, and its end, which gives all back.

    worker ── Passed ──► inbox (at most a window) ──► write ── drained by the client ──► ReadOn ──► worker

What the client reads slowly stays with the engine. Until the first piece, an error has a status of its own; later, it ends a stream as its
last event, and cuts the connection under any other answer, since nothing else tells that it is not whole.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from starlette.types import Send

from polyphase.core.errors import PolyphaseError
from polyphase.core.ids import RequestId
from polyphase.frontend.bodies import ClientGone
from polyphase.frontend.dispatch import Dispatcher
from polyphase.frontend.flight import Flight, Job
from polyphase.frontend.hints import RoutingHints
from polyphase.frontend.inbox import Arrival, End, Inbox
from polyphase.frontend.metrics import Metrics
from polyphase.frontend.models import Addressed
from polyphase.frontend.passing import WINDOW_BYTES, Passing
from polyphase.frontend.problems import error_events, start_message
from polyphase.frontend.records import RequestRecord, places_of
from polyphase.frontend.terms import Terms
from polyphase.wire.requests import FinishReason, Passed, PassedUsage, SamplingParams, StopConditions

log = logging.getLogger(__name__)

WRITE_GRACE_S = 10.0  # for the last bytes, beyond the request's own deadline
EVENT_STREAM = "text/event-stream"
_GRANT_BYTES = WINDOW_BYTES // 4  # read before the worker is told: a message for each token would cost more than it saves


@dataclass(frozen=True, slots=True)
class Errand:
    """What is to be passed on, for whom, and on what terms."""

    internal_id: RequestId
    addressed: Addressed
    passing: Passing
    terms: Terms
    hints: RoutingHints


class Relay:
    """A context manager: leaving it cancels what still runs and closes the record, however it is left."""

    def __init__(self, errand: Errand, dispatcher: Dispatcher, metrics: Metrics, record: RequestRecord) -> None:
        self._errand = errand
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._model_metrics = metrics.of(errand.addressed.model.name)
        self.record = record
        self._inbox = Inbox()
        self._flight: Flight | None = None
        self._is_client_gone = False
        self._read_bytes = 0  # and not told yet
        self._usage: PassedUsage | None = None
        self._started = time.perf_counter()

    def start(self) -> None:
        """Send it on its way, or let it wait. Raises: NoWorkers, Overloaded; then there is nothing to be cancelled."""
        errand, passing = self._errand, self._errand.passing
        job = Job(
            sequence_id=errand.internal_id,
            index=0,
            model=errand.addressed.model.name,
            block_size=errand.addressed.model.card.block_size,
            prompt_ids=[],
            hashes=passing.hashes,
            sampling=SamplingParams(seed=0),
            stop=StopConditions(max_tokens=passing.max_output_tokens),
            priority=passing.priority,
            hints=errand.hints,
            lora=errand.addressed.adapter,
            passing=passing,
        )
        (self._flight,) = self._dispatcher.start([job], self._inbox, errand.terms)
        self.record.sequences.append(self._flight.record)

    async def run(self, send: Send) -> None:
        """To the last byte. Raises: the error that ended it before the first one; ClientGone, also for one that does not read in time."""
        left_s = max(self._errand.terms.deadline_ns - self._dispatcher.now_ns(), 0) / 1e9
        try:
            async with asyncio.timeout(left_s + WRITE_GRACE_S):
                await self._relay(send)
        except TimeoutError:
            log.warning("the client did not read its answer in time; giving it up")
            raise ClientGone from None

    async def _relay(self, send: Send) -> None:
        arrival = await self._next()
        if arrival.end is not None and arrival.end.error is not None:
            raise arrival.end.error
        first = arrival.passed or Passed()
        await send(start_message(first.status or 200, self._headers(first, is_whole=arrival.end is not None)))
        while True:
            data = arrival.passed.data if arrival.passed is not None else b""
            end = arrival.end
            if end is not None and end.error is not None:
                await self._break_off(data, first.content_type, end.error, send)
                return
            if end is not None:
                self._note_finished(first.status)
            await send({"type": "http.response.body", "body": data, "more_body": end is None})
            if end is not None:
                return
            self._note_read(len(data))
            arrival = await self._next()

    def abandon(self) -> None:
        """The client is gone: stop it now, even while a write is still pending."""
        if self.record.status == "running" and not self._is_client_gone:
            self._is_client_gone = True
            self._cancel()
            self._inbox.put(Arrival(0, end=End()))

    async def _next(self) -> Arrival:
        (arrival,) = await self._inbox.take()
        if self._is_client_gone:
            raise ClientGone
        if arrival.passed is not None:
            self._usage = arrival.passed.usage or self._usage
        return arrival

    async def _break_off(self, data: bytes, content_type: str, error: PolyphaseError, send: Send) -> None:
        log.warning("the answer broke off: %s: %s", error.code, error.message)
        self._close_record(error)
        if content_type.startswith(EVENT_STREAM):
            await send({"type": "http.response.body", "body": data + error_events(error)})
        # else: an answer that is never completed, so that the server closes the connection on it

    def _headers(self, first: Passed, *, is_whole: bool) -> dict[str, str]:
        headers = {"content-type": first.content_type or "application/octet-stream", **places_of(self.record)}
        if first.content_type.startswith(EVENT_STREAM):
            headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
        if is_whole:
            headers["content-length"] = str(len(first.data))
        return headers

    def _note_read(self, byte_count: int) -> None:
        self._read_bytes += byte_count
        if self._read_bytes >= _GRANT_BYTES and self._flight is not None:
            self._dispatcher.read_on(self._flight, self._read_bytes)
            self._read_bytes = 0

    def _note_finished(self, status: int) -> None:
        self.record.status = "finished"
        self.record.finish_reason = str(FinishReason.STOP) if status < 400 else f"status {status} of the engine"
        if self._usage is not None:
            self.record.prompt_tokens = self._usage.prompt_tokens
            self.record.sequences[0].completion_tokens = self._usage.completion_tokens

    def __enter__(self) -> Self:
        self._model_metrics.active_requests.inc()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._cancel()
        self._model_metrics.active_requests.dec()
        self._close_record(error)
        self._observe()

    def _cancel(self) -> None:
        if self._flight is not None:
            self._dispatcher.cancel(self._flight)

    def _close_record(self, error: BaseException | None) -> None:
        record = self.record
        if record.status != "running":
            return
        if error is None or isinstance(error, ClientGone | asyncio.CancelledError):
            record.status = record.finish_reason = "cancelled"
        else:
            record.status, record.finish_reason = "failed", "error"
            record.error = f"{error.code if isinstance(error, PolyphaseError) else 'internal_error'}: {error}"

    def _observe(self) -> None:
        record, metrics = self.record, self._model_metrics
        self._metrics.requests.labels(record.model, record.endpoint, record.status).inc()
        self._metrics.passed_requests.labels(record.model, record.passed or "", record.status).inc()
        metrics.duration_s.observe(time.perf_counter() - self._started)
        if self._usage is not None:
            metrics.input_tokens.observe(self._usage.prompt_tokens)
            metrics.output_tokens.observe(self._usage.completion_tokens)
            metrics.cached_tokens.observe(self._usage.cached_tokens)
        if record.status == "cancelled":
            metrics.cancellations.inc()
        log.info("%s %s: %s, passed through: %s", record.endpoint, record.status, record.finish_reason, record.passed)
