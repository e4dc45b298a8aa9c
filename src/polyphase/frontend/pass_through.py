"""Endpoints whose requests go to an engine as bodies, and the decision whether one of the others has to."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.types import Receive, Scope, Send

from polyphase.core.errors import BodyTooLarge, KindNotServed
from polyphase.frontend.bodies import check_content_type, header, read_body, until_gone
from polyphase.frontend.forms import asked_in_form
from polyphase.frontend.hints import RoutingHints
from polyphase.frontend.models import Addressed, ServedModel
from polyphase.frontend.names import RequestNames
from polyphase.frontend.passing import (
    GENERATING,
    MAX_BODY_BYTES,
    Asked,
    asked_in_json,
    carried_headers,
    may_hold_media,
    media_in,
    passing_of,
)
from polyphase.frontend.problems import refuse_body
from polyphase.frontend.records import RequestRecord
from polyphase.frontend.relay import Errand, Relay
from polyphase.frontend.terms import terms_of
from polyphase.router import WorkerFacts
from polyphase.wire.cards import RequestKind

if TYPE_CHECKING:
    from polyphase.frontend.endpoints import Services

PATHS: dict[str, RequestKind] = {
    "/v1/embeddings": RequestKind.EMBEDDINGS,
    "/v1/rerank": RequestKind.RERANK,
    "/rerank": RequestKind.RERANK,
    "/v1/score": RequestKind.SCORE,
    "/score": RequestKind.SCORE,
    "/v1/classify": RequestKind.CLASSIFY,
    "/classify": RequestKind.CLASSIFY,
    "/v1/audio/transcriptions": RequestKind.TRANSCRIPTIONS,
    "/v1/audio/translations": RequestKind.TRANSLATIONS,
    "/v1/audio/speech": RequestKind.SPEECH,
}
FORMS = frozenset({RequestKind.TRANSCRIPTIONS, RequestKind.TRANSLATIONS})


@dataclass(frozen=True, slots=True)
class Claim:
    """A request that has to be passed through, and the model that it asks."""

    kind: RequestKind
    asked: Asked
    addressed: Addressed

    @property
    def model(self) -> ServedModel:
        return self.addressed.model


class PassThrough:
    """`facts`: of the workers that are there."""

    def __init__(self, services: Services, facts: Callable[[], Sequence[WorkerFacts]]) -> None:
        self._services = services
        self._facts = facts

    def claim(self, kind: RequestKind, body: bytes) -> Claim | None:
        """Whether this generating request has to be passed through; None: it goes the usual way, which tells what is wrong with it too.

        Raises: InvalidRequest, ModelNotFound, NoWorkers, if it had to be.
        """
        models = self._services.models
        has_media = kind is RequestKind.CHAT and may_hold_media(body)
        if not has_media and not models.takes_text():
            return None
        asked = asked_in_json(body)
        addressed = models.resolve(asked.model)
        if addressed.model.takes_tokens and not (has_media and media_in(asked.fields)):
            return None
        return Claim(kind, asked, addressed)

    async def serve(self, claim: Claim, body: bytes, received_ns: int, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises: whatever ends it before its answer begins."""
        services, asked, model = self._services, claim.asked, claim.model
        self._check(claim)
        if len(body) > MAX_BODY_BYTES:
            raise BodyTooLarge(f"the body has {len(body):,} bytes; of requests that are passed through, it may have {MAX_BODY_BYTES:,}")
        terms = terms_of(scope, asked.user, services.settings, received_ns)
        names: RequestNames = scope["state"]["names"]
        content_type = header(scope, b"content-type") or "application/json"
        block_size = None if model.takes_tokens else model.card.block_size
        passing = passing_of(claim.kind, asked, body, content_type, carried_headers(scope["headers"]), block_size)
        record = RequestRecord(
            id=names.shown,
            answer_id=names.answer_id("pass"),
            model=claim.addressed.true_name,
            asked_for=asked.model if asked.model != claim.addressed.true_name else None,
            endpoint=_endpoint(claim.kind),
            created_unix_s=int(time.time()),
            prompt_tokens=passing.prompt_token_count,
            passed=passing.shown_kinds,
        )
        services.records.add(names.internal, record)
        errand = Errand(names.internal, claim.addressed, passing, terms, RoutingHints.of(scope, asked))
        with Relay(errand, services.dispatcher, services.metrics, record) as relay:
            relay.start()
            async with until_gone(receive, relay.abandon):
                await relay.run(send)

    def _check(self, claim: Claim) -> None:
        """Raises: KindNotServed if no worker would take it, however long it waited."""
        model = claim.model
        passed = [facts.passes for facts in self._facts() if facts.model == model.name]
        media = media_in(claim.asked.fields) if claim.kind is RequestKind.CHAT else {}
        needs = {str(claim.kind), *media}
        if not passed or any(needs <= one for one in passed):
            return
        taken = sorted({kind for one in passed for kind in one} | (set(map(str, GENERATING)) if model.takes_tokens else set()))
        lacking = sorted(needs - set().union(*passed)) or sorted(needs)
        where = next((f"{path}: " for kind, path in media.items() if kind in lacking), "")
        raise KindNotServed(
            f"{where}no worker of the model {model.name!r} takes {' with '.join(lacking)}; they take: {', '.join(taken) or 'nothing'}",
            param=next((f"{path}.type" for kind, path in media.items() if kind in lacking), None),
        )


class PassedEndpoint:
    """One of `PATHS`."""

    def __init__(self, kind: RequestKind, passing: PassThrough, services: Services) -> None:
        self._kind = kind
        self._passing = passing
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._services.door.enter():
            received_ns = self._services.dispatcher.now_ns()
            content_type = header(scope, b"content-type") or ""
            if self._kind not in FORMS:
                check_content_type(scope)
            try:
                body = await read_body(scope, receive, self._services.settings)
            except BodyTooLarge as error:
                await refuse_body(error, receive, send)
                return
            asked = asked_in_form(body, content_type) if self._kind in FORMS else asked_in_json(body)
            claim = Claim(self._kind, asked, self._services.models.resolve(asked.model))
            await self._passing.serve(claim, body, received_ns, scope, receive, send)


def _endpoint(kind: RequestKind) -> str:
    """As in metrics and records, where generation has OpenAI's names of its answers."""
    return "chat.completions" if kind is RequestKind.CHAT else kind.value
