"""Requests that go to a server as bodies: one task and connection for each, their answers cut into pieces within the window of each.

    forward ──► Passage ── task: POST ──► status, bytes ──► pieces, while less than a window is unread ──► take_outputs
    read_on ──► more room                 abort ──► task cancelled, connection closed

A whole answer in JSON is taken in before any of it is told, up to `MAX_WHOLE_BYTES`: if the server dies in its middle, another one can
still be asked. A stream is told as it comes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import httpx
import msgspec

from polyphase.core.errors import DeadlineExceeded, EngineFailed, InvalidRequest, Overloaded, PolyphaseError
from polyphase.engines.served.access import Access, Passes
from polyphase.engines.served.gate import Gate, retry_after_s
from polyphase.engines.served.rewriting import AnswerModel, EventRewriter, usage_in, with_model
from polyphase.wire.cards import RequestKind
from polyphase.wire.requests import FinishReason, Forward, Passed, PassedUsage, SequenceOutput, WireFailure

log = logging.getLogger(__name__)

MAX_WHOLE_BYTES = 8 << 20
MAX_ERROR_BYTES = 64 << 10
PIECE_BYTES = 64 << 10
_GENERATING = (RequestKind.CHAT, RequestKind.COMPLETIONS)
_TOO_EARLY = (408, 425, 429, 503)  # statuses that say: not now

WhyBroken = Callable[[httpx.HTTPError], Awaitable[str]]


@dataclass(slots=True)
class Passage:
    """One request. `pending` is what was not reported yet, `unread` what was not read by the client, that included."""

    request: Forward
    task: asyncio.Task[None] | None = None
    has_answered: bool = False
    is_whole: bool = False
    pending: bytearray = field(default_factory=bytearray)
    status: int = 0
    content_type: str = ""
    usage: PassedUsage | None = None
    finish: FinishReason | None = None
    failure: WireFailure | None = None
    unread: int = 0
    has_room: asyncio.Event = field(default_factory=asyncio.Event)

    def read_on(self, byte_count: int) -> None:
        self.unread = max(0, self.unread - byte_count)
        self.has_room.set()

    def end(self, finish: FinishReason) -> None:
        if self.finish is None:
            self.finish = finish

    def fail(self, error: PolyphaseError) -> None:
        if self.finish is None:
            self.finish = FinishReason.ERROR
            self.failure = WireFailure(error.code, error.message, error.is_retryable)

    def take_output(self) -> SequenceOutput:
        """What is new since the last call."""
        passed: Passed | None = None
        if self.pending or self.status or (self.finish is not None and self.usage is not None):
            usage = self.usage if self.finish is not None else None
            passed = Passed(data=bytes(self.pending), status=self.status, content_type=self.content_type, usage=usage)
            self.pending.clear()
            self.status, self.content_type = 0, ""
        return SequenceOutput(request_id=self.request.request_id, finish_reason=self.finish, failure=self.failure, passed=passed)


class Passages:
    """All of one server. `on_change` is called on the loop when one has something to report."""

    def __init__(self, passes: Passes, access: Access, engine: str, gate: Gate, on_change: Callable[[], None]) -> None:
        self._passes = passes
        self._access = access
        self._engine = engine
        self._gate = gate
        self._on_change = on_change
        self._live: dict[str, Passage] = {}
        self._changed: dict[str, Passage] = {}

    def __len__(self) -> int:
        return len(self._live)

    @property
    def waiting_tokens(self) -> int:
        """Of prompts whose first token is awaited. Nothing tells when that of a whole answer comes, so these do not count."""
        return sum(one.request.prompt_token_count for one in self._live.values() if one.request.wants_stream and not one.has_answered)

    def start(self, request: Forward, client: httpx.AsyncClient, tasks: asyncio.TaskGroup, why_broken: WhyBroken) -> None:
        passage = self._live[request.request_id] = Passage(request)
        passage.task = tasks.create_task(self._travel(passage, client, why_broken), name=f"passed-{request.request_id}")

    def read_on(self, request_id: str, byte_count: int) -> None:
        passage = self._live.get(request_id)
        if passage is not None:
            passage.read_on(byte_count)

    def leave(self, request_id: str, reason: FinishReason) -> None:
        """Unknown ids are ignored; so is one that is to go on elsewhere and cannot, since part of its answer is told."""
        passage = self._live.get(request_id)
        if passage is None or (reason is FinishReason.HANDED_OVER and passage.has_answered):
            return
        if passage.task is not None:
            passage.task.cancel()
        passage.end(reason)
        self._note_changed(passage)

    def take_outputs(self) -> list[SequenceOutput]:
        changed, self._changed = self._changed, {}
        return [passage.take_output() for passage in changed.values()]

    def clear(self) -> None:
        self._live.clear()
        self._changed.clear()

    async def _travel(self, passage: Passage, client: httpx.AsyncClient, why_broken: WhyBroken) -> None:
        """However it ends, it has its terminal output. Cancel: whoever cancels says how it ends."""
        try:
            await self._exchange(passage, client)
            passage.end(FinishReason.STOP)
        except PolyphaseError as error:
            passage.fail(error)
        except httpx.HTTPError as error:
            said = self._access.hide(await why_broken(error))
            if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                self._gate.close(said, time.monotonic())
            else:
                self._gate.note_failure(said, time.monotonic())
            passage.fail(EngineFailed(said))
        except Exception:  # the root of this request's work: it gets its answer, and the others go on
            log.exception("the answer of %s to %s cannot be handled", self._engine, passage.request.request_id)
            passage.fail(EngineFailed(f"the answer of {self._engine} could not be handled"))
        self._note_changed(passage)

    async def _exchange(self, passage: Passage, client: httpx.AsyncClient) -> None:
        request = passage.request
        body = with_model(request.body, request.lora or self._passes.upstream_name, request.model_span)
        headers = {
            **dict(request.headers),
            **self._access.headers(),
            "content-type": request.content_type,
            "accept-encoding": "identity",  # a compressed stream would come in lumps
            "x-request-id": request.request_id,
        }
        async with client.stream("POST", self._passes.path_of(request.kinds[0]), content=body, headers=headers) as response:
            content_type = response.headers.get("content-type", "application/octet-stream")
            if 300 <= response.status_code < 400:
                raise EngineFailed(f"{self._engine} sends elsewhere (status {response.status_code}); attach to the address that it names")
            if response.status_code >= 400:
                await self._take_error(passage, response)
            elif content_type.startswith("text/event-stream"):
                await self._take_stream(passage, response, content_type)
            elif _is_json(content_type):
                await self._take_whole(passage, response, content_type)
            else:
                self._begin(passage, response.status_code, content_type)
                async for data in response.aiter_bytes(PIECE_BYTES):
                    await self._tell(passage, data)
        if not response.status_code >= 500:
            self._gate.note_success()

    async def _take_stream(self, passage: Passage, response: httpx.Response, content_type: str) -> None:
        events = EventRewriter(self._names_of(passage.request))
        self._begin(passage, response.status_code, content_type)
        early = b""  # comments that keep a connection alive
        async for received in response.aiter_bytes():
            early += events.push(received)
            if early and (passage.has_answered or b"data:" in early or len(early) > PIECE_BYTES):
                passage.usage = events.usage
                data, early = early, b""
                await self._tell(passage, data)
        if rest := early + events.rest():
            await self._tell(passage, rest)
        if passage.request.kinds[0] in _GENERATING and not events.has_ended:
            raise EngineFailed(f"{self._engine} ended its answer without saying why")

    async def _take_whole(self, passage: Passage, response: httpx.Response, content_type: str) -> None:
        gathered = bytearray()
        is_begun = False
        async for received in response.aiter_bytes():
            gathered += received
            if len(gathered) > MAX_WHOLE_BYTES and not is_begun:
                is_begun = True
                self._begin(passage, response.status_code, content_type)
            if is_begun:
                await self._tell(passage, bytes(gathered))
                gathered.clear()
        if not is_begun:
            whole = bytes(gathered)
            passage.usage = usage_in(whole)
            self._begin(passage, response.status_code, content_type)
            await self._tell(passage, self._names_of(passage.request).in_json(whole))

    async def _take_error(self, passage: Passage, response: httpx.Response) -> None:
        """The caller's own fault comes through as the engine says it. Raises: what another server may do better, or we did wrong."""
        body = await _start_of(response, MAX_ERROR_BYTES)
        status = response.status_code
        said = self._access.hide(message_of(body) or f"status {status}")
        if status in _TOO_EARLY:
            self._gate.note_full(retry_after_s(response.headers.get("retry-after")), time.monotonic())
            raise Overloaded(f"{self._engine} takes no more requests now: {said}")
        if status == 504:
            raise DeadlineExceeded(f"{self._engine} gave the request up: {said}")
        if status >= 500 and status != 501:
            failure = f"{self._engine} failed with status {status}: {said}"
            self._gate.note_failure(failure, time.monotonic())
            raise EngineFailed(failure)
        if status in (401, 403, 407):
            raise EngineFailed(f"{self._engine} refused this deployment's API key or has none (status {status}): {said}")
        if status in (404, 405, 501) and not _is_openai_error(body):
            raise InvalidRequest(f"{self._engine} does not take {passage.request.kinds[0]} requests (status {status}): {said}")
        self._begin(passage, status, "application/json")
        await self._tell(passage, self._access.hide(_openai_error(body, said, status).decode()).encode())

    def _names_of(self, request: Forward) -> AnswerModel:
        return AnswerModel(request.model, request.lora or self._passes.upstream_name)

    def _begin(self, passage: Passage, status: int, content_type: str) -> None:
        """It goes with the first bytes: many servers say 200 before they have done anything, and until then another one may be asked."""
        passage.status, passage.content_type = status, content_type

    async def _tell(self, passage: Passage, data: bytes) -> None:
        """Waits while the window is full. Several pieces before the next report are one."""
        window = passage.request.window
        for start in range(0, len(data), PIECE_BYTES):
            while passage.unread >= window:
                passage.has_room.clear()
                await passage.has_room.wait()
            piece = data[start : start + PIECE_BYTES]
            passage.has_answered = True
            passage.pending += piece
            passage.unread += len(piece)
            self._note_changed(passage)

    def _note_changed(self, passage: Passage) -> None:
        if passage.finish is not None and self._live.pop(passage.request.request_id, None) is None:
            return
        self._changed[passage.request.request_id] = passage
        self._on_change()


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


async def _start_of(response: httpx.Response, limit: int) -> bytes:
    gathered = b""
    async for received in response.aiter_bytes():
        gathered += received
        if len(gathered) >= limit:
            break
    return gathered[:limit]


def message_of(body: bytes) -> str:
    """The message in an error's body, or the body's beginning. Servers have many forms: OpenAI's, `detail`, `message`, plain text."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body[:500].decode(errors="replace").strip()
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return found if isinstance(found, str) else msgspec.json.encode(found).decode()[:500]


def _is_openai_error(body: bytes) -> bool:
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return isinstance(found, dict) and isinstance(found.get("error"), dict) and isinstance(found["error"].get("message"), str)


def _openai_error(body: bytes, said: str, status: int) -> bytes:
    """In OpenAI's form; one that has it stays as it is."""
    if _is_openai_error(body):
        return body
    kind = "invalid_request_error" if status < 500 else "server_error"
    return msgspec.json.encode({"error": {"message": said, "type": kind, "param": None, "code": f"status_{status}"}})
