"""The two endpoints that generate text, as ASGI applications: from the body to the last byte of the answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from starlette.types import Receive, Scope, Send

from polyphase.core.errors import BodyTooLarge, InvalidRequest, PolyphaseError
from polyphase.frontend.answers import DONE, AnswerFields, Usage
from polyphase.frontend.assembly import Piece
from polyphase.frontend.bodies import ClientGone, check_content_type, parse_body, read_body, until_gone
from polyphase.frontend.dispatch import Dispatcher
from polyphase.frontend.door import Door
from polyphase.frontend.generation import Generation, Order
from polyphase.frontend.grammar_checks import GrammarChecks
from polyphase.frontend.grammars import GrammarWish
from polyphase.frontend.hints import RoutingHints
from polyphase.frontend.metrics import Metrics
from polyphase.frontend.models import Models, ServedModel
from polyphase.frontend.names import RequestNames
from polyphase.frontend.openai_types import GenerationRequest
from polyphase.frontend.pass_through import PassThrough
from polyphase.frontend.problems import InternalError, error_events, refuse_body, start_message
from polyphase.frontend.prompts import Prompt
from polyphase.frontend.records import Records, RequestRecord, places_of
from polyphase.frontend.settings import FrontendSettings
from polyphase.frontend.terms import Terms, terms_of
from polyphase.frontend.validation import Wishes
from polyphase.runtime import StreamView
from polyphase.text import Tokenizer
from polyphase.wire.cards import RequestKind

log = logging.getLogger(__name__)

WRITE_GRACE_S = 10.0  # for the last bytes, beyond the request's own deadline
RequestT = TypeVar("RequestT", bound=GenerationRequest)


class AnswerFormat(Protocol):
    """Makes one endpoint's JSON of the pieces."""

    def chunks(self, piece: Piece, usage: Usage | None) -> bytes:
        """Server-sent events; with `usage` in each of them, if it is given."""

    def usage_chunk(self, usage: Usage) -> bytes: ...

    def whole(self, pieces: list[Piece], usage: Usage) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Surface(Generic[RequestT]):
    """In what the endpoints differ."""

    name: str
    kind: RequestKind  # where it has to be passed through
    id_prefix: str
    request: type[RequestT]
    wishes: Callable[[RequestT, ServedModel], Wishes]
    prompts: Callable[[RequestT, Wishes, ServedModel, FrontendSettings], Awaitable[list[Prompt]]]
    format: Callable[[AnswerFields, Wishes, list[Prompt], Tokenizer], AnswerFormat]


@dataclass(slots=True)
class Services:
    """What the endpoints work with; one per frontend."""

    models: Models
    dispatcher: Dispatcher
    records: Records
    metrics: Metrics
    settings: FrontendSettings
    grammars: GrammarChecks
    door: Door = field(default_factory=Door)
    streams: Callable[[], Mapping[str, StreamView]] = dict  # by worker id: how the event streams of those that are there do
    turned_away: Callable[[], Mapping[str, str]] = dict  # by worker id: why it gets no requests although it is there


class GenerationEndpoint(Generic[RequestT]):
    """POST a request, get an answer or a stream. Errors before the first token are raised; later ones end the stream."""

    def __init__(self, surface: Surface[RequestT], services: Services, passing: PassThrough) -> None:
        self._surface = surface
        self._services = services
        self._passing = passing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._services.door.enter():
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        received_ns = self._services.dispatcher.now_ns()
        check_content_type(scope)
        try:
            body = await read_body(scope, receive, self._services.settings)
        except BodyTooLarge as error:
            await refuse_body(error, receive, send)
            return
        claim = self._passing.claim(self._surface.kind, body)
        if claim is not None:
            await self._passing.serve(claim, body, received_ns, scope, receive, send)
            return
        names: RequestNames = scope["state"]["names"]
        request = parse_body(body, self._surface.request)
        terms = terms_of(scope, request.user, self._services.settings, received_ns)
        order = await self._order(request, names, terms, RoutingHints.of(scope, request))
        record = self._open_record(order, names, request.model)
        answer = AnswerFields(record.answer_id, request.model, record.created_unix_s)
        form = self._surface.format(answer, order.wishes, order.prompts, order.model.tokenizer)
        with Generation(order, self._services.dispatcher, self._services.metrics, record) as generation:
            generation.start()
            async with until_gone(receive, generation.abandon):
                if order.wishes.stream:
                    await self._stream(generation, form, order.wishes, send)
                else:
                    await self._answer(generation, form, send)

    async def _order(self, request: RequestT, names: RequestNames, terms: Terms, hints: RoutingHints) -> Order:
        addressed = self._services.models.resolve(request.model)
        model = addressed.model
        wishes = replace(self._surface.wishes(request, model), lora=addressed.adapter)
        if wishes.grammar is not None:
            await self._check(wishes.grammar, model)
        prompts = await self._surface.prompts(request, wishes, model, self._services.settings)
        return Order(names.internal, model, wishes, prompts, terms, hints)

    async def _check(self, wish: GrammarWish, model: ServedModel) -> None:
        """Raises: InvalidRequest, Overloaded."""
        if not self._services.dispatcher.takes_grammars(model.name):
            raise InvalidRequest(f"no worker of the model {model.name!r} has structured output; leave {wish.param} out", param=wish.param)
        await self._services.grammars.check(wish, model)

    def _open_record(self, order: Order, names: RequestNames, asked_for: str) -> RequestRecord:
        model = order.wishes.lora or order.model.name
        record = RequestRecord(
            id=names.shown,
            answer_id=names.answer_id(self._surface.id_prefix),
            model=model,
            endpoint=self._surface.name,
            created_unix_s=int(time.time()),
            prompt_tokens=sum(len(prompt.token_ids) for prompt in order.prompts),
            asked_for=asked_for if asked_for != model else None,
        )
        self._services.records.add(names.internal, record)
        return record

    async def _answer(self, generation: Generation, form: AnswerFormat, send: Send) -> None:
        gathered: dict[int, list[Piece]] = {}
        while not generation.is_done:
            for piece in await generation.next_pieces():
                gathered.setdefault(piece.index, []).append(piece)
        body = form.whole([_joined(gathered[index]) for index in sorted(gathered)], generation.usage())
        headers = {"content-type": "application/json", "content-length": str(len(body)), **places_of(generation.record)}
        await send(start_message(200, headers))
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, generation: Generation, form: AnswerFormat, wishes: Wishes, send: Send) -> None:
        pieces = await generation.next_pieces()  # an error until here still gets a status of its own
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
        try:
            async with asyncio.timeout(self._services.settings.request_timeout_s + WRITE_GRACE_S):
                await send(start_message(200, {**headers, **places_of(generation.record)}))
                while not generation.is_done:
                    await _write(send, _events(form, pieces, generation, wishes))
                    pieces = await generation.next_pieces()
                last = _events(form, pieces, generation, wishes)
                usage = form.usage_chunk(generation.usage()) if wishes.include_usage else b""
                await _write(send, last + usage + DONE, is_last=True)
        except PolyphaseError as error:
            log.warning("the stream broke off: %s: %s", error.code, error.message)
            generation.fail(error)
            await _write(send, error_events(error), is_last=True)
        except ClientGone:
            raise
        except TimeoutError:
            log.warning("the client did not read its stream in time; giving it up")
            raise ClientGone from None
        except Exception as error:  # the root of this request's task, with the answer under way
            log.exception("internal error in a stream")
            generation.fail(error)
            await _write(send, error_events(InternalError(generation.record.id)), is_last=True)


def _events(form: AnswerFormat, pieces: list[Piece], generation: Generation, wishes: Wishes) -> bytes:
    usage = generation.usage() if wishes.continuous_usage else None
    return b"".join([form.chunks(piece, usage) for piece in pieces])


def _joined(pieces: list[Piece]) -> Piece:
    last = pieces[-1]
    return Piece(
        index=last.index,
        text="".join(piece.text for piece in pieces),
        token_ids=[token_id for piece in pieces for token_id in piece.token_ids],
        logprobs=[logprob for piece in pieces for logprob in piece.logprobs],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )


async def _write(send: Send, data: bytes, *, is_last: bool = False) -> None:
    if data or is_last:
        await send({"type": "http.response.body", "body": data, "more_body": not is_last})
