"""One accepted HTTP request: its sequences, what has come of them, and its end, which gives everything back."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from polyphase.core.errors import PolyphaseError
from polyphase.core.ids import RequestId
from polyphase.frontend.answers import Usage
from polyphase.frontend.assembly import Assembler, Piece
from polyphase.frontend.bodies import ClientGone
from polyphase.frontend.dispatch import Dispatcher
from polyphase.frontend.flight import Flight, Job
from polyphase.frontend.hints import NO_HINTS, RoutingHints
from polyphase.frontend.inbox import Arrival, End, Inbox
from polyphase.frontend.metrics import Metrics
from polyphase.frontend.models import ServedModel
from polyphase.frontend.prompts import Prompt
from polyphase.frontend.records import RequestRecord
from polyphase.frontend.terms import Terms
from polyphase.frontend.validation import Wishes

log = logging.getLogger(__name__)

_WAKE_UP = -1  # index of an arrival that is no choice's


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for, checked and tokenised."""

    internal_id: RequestId
    model: ServedModel
    wishes: Wishes
    prompts: list[Prompt]
    terms: Terms
    hints: RoutingHints = NO_HINTS


class Generation:
    """A context manager: leaving it cancels what still runs and closes the record, however it is left.

    with Generation(order, dispatcher, metrics, record) as generation:
        generation.start()
        while not generation.is_done:
            pieces = await generation.next_pieces()
    """

    def __init__(self, order: Order, dispatcher: Dispatcher, metrics: Metrics, record: RequestRecord) -> None:
        self._order = order
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._model_metrics = metrics.of(order.model.name)
        self.record = record
        self._inbox = Inbox()
        self._flights: dict[int, Flight] = {}
        self._assemblers: dict[int, Assembler] = {}
        self._open_count = len(order.prompts) * order.wishes.choice_count
        self._is_client_gone = False
        self._started = time.perf_counter()

    @property
    def is_done(self) -> bool:
        return self._open_count == 0

    def start(self) -> None:
        """Send every sequence on its way, or let them wait. Raises: NoWorkers, Overloaded; then there is nothing to be cancelled."""
        order = self._order
        jobs = [self._job(index) for index in range(self._open_count)]
        for job in jobs:
            self._assemblers[job.index] = Assembler(order.model, job.prompt_ids, order.wishes)
        for flight in self._dispatcher.start(jobs, self._inbox, order.terms):
            self._flights[flight.job.index] = flight
            self.record.sequences.append(flight.record)

    def _job(self, index: int) -> Job:
        order = self._order
        prompt = order.prompts[index // order.wishes.choice_count]
        is_single = self._open_count == 1
        return Job(
            sequence_id=order.internal_id if is_single else RequestId(f"{order.internal_id}-{index}"),
            index=index,
            model=order.model.name,
            block_size=order.model.card.block_size,
            prompt_ids=prompt.token_ids,
            hashes=prompt.hashes,
            sampling=order.wishes.sampling_for(index),
            stop=prompt.stop,
            cache_salt=order.wishes.cache_salt,
            priority=order.wishes.priority,
            hints=order.hints,
            grammar=None if order.wishes.grammar is None else order.wishes.grammar.grammar,
            lora=order.wishes.lora,
        )

    async def next_pieces(self) -> list[Piece]:
        """What has come since the last call, one piece per choice; waits until something has.

        Raises: ClientGone; the error that ended a sequence.
        """
        arrivals = await self._inbox.take()
        if self._is_client_gone:
            raise ClientGone
        pieces: list[Piece] = []
        for arrival in arrivals:
            assembler = self._assemblers.get(arrival.index)
            if assembler is None or assembler.is_done:
                continue
            if arrival.end is not None and arrival.end.error is not None:
                raise arrival.end.error
            piece = assembler.feed(arrival)
            if piece.finish_reason is not None:
                self._open_count -= 1
                self._dispatcher.cancel(self._flights[arrival.index])  # a stop string that the engine does not know of
                if arrival.index == 0 or self.record.finish_reason is None:
                    self.record.finish_reason = piece.finish_reason
            pieces.append(piece)
        if self.is_done:
            self.record.status = "finished"
        return pieces

    def abandon(self) -> None:
        """The client is gone: stop everything now, even while a write to it is still pending."""
        if not self.is_done and not self._is_client_gone:
            self._is_client_gone = True
            self._cancel_flights()
            self._inbox.put(Arrival(_WAKE_UP, end=End()))

    def fail(self, error: Exception) -> None:
        """Close the record with an error that was already told to the client, or is about to be."""
        self._cancel_flights()
        self._close_record(error)

    def usage(self) -> Usage:
        """Of now. A prompt counts once, however many choices it has."""
        count = self._order.wishes.choice_count
        cached = sum(flight.record.cached_tokens for index, flight in self._flights.items() if index % count == 0)
        output = sum(assembler.token_count for assembler in self._assemblers.values())
        return Usage.of(self.record.prompt_tokens, output, cached)

    def __enter__(self) -> Self:
        self._model_metrics.active_requests.inc()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._cancel_flights()
        self._model_metrics.active_requests.dec()
        self._close_record(error)
        self._observe()

    def _cancel_flights(self) -> None:
        for flight in self._flights.values():
            self._dispatcher.cancel(flight)

    def _close_record(self, error: BaseException | None) -> None:
        record = self.record
        if record.status != "running":
            return
        if error is None or isinstance(error, ClientGone | asyncio.CancelledError):
            record.status = record.finish_reason = "cancelled"
        else:
            record.status, record.finish_reason = "failed", "error"
            code = error.code if isinstance(error, PolyphaseError) else "internal_error"
            record.error = f"{code}: {error}"

    def _observe(self) -> None:
        record, metrics = self.record, self._model_metrics
        self._metrics.requests.labels(record.model, record.endpoint, record.status).inc()
        metrics.duration_s.observe(time.perf_counter() - self._started)
        metrics.input_tokens.observe(record.prompt_tokens)
        usage = self.usage()
        metrics.output_tokens.observe(usage.completion_tokens)
        metrics.cached_tokens.observe(usage.prompt_tokens_details.cached_tokens)
        if record.status == "cancelled":
            metrics.cancellations.inc()
        log.info(
            "%s %s: %s, %d prompt tokens, %d cached, %d generated",
            record.endpoint,
            record.status,
            record.finish_reason,
            usage.prompt_tokens,
            usage.prompt_tokens_details.cached_tokens,
            usage.completion_tokens,
        )
