"""Request bodies: read with a bound, checked for their type, parsed into the structs of openai_types.py; errors name the field."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import re
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import msgspec
from starlette.types import Message, Receive, Scope

from polyphase.core.errors import BodyTooLarge, InvalidRequest, UnsupportedMediaType
from polyphase.frontend.openai_types import ChatRequest, CompletionRequest, GenerationRequest
from polyphase.frontend.settings import FrontendSettings
from polyphase.frontend.unsupported import NEUTRAL_VALUES, is_neutral

RequestT = TypeVar("RequestT", bound=GenerationRequest)

LINGER_S = 1.0
LINGER_BYTES = 64_000_000
_DECODERS: dict[type[GenerationRequest], msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind) for kind in (ChatRequest, CompletionRequest)
}
_ERROR = re.compile(r"(?P<what>.*?)(?: - at `(?P<where>(?:key in )?\$.*)`)?", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`")
_EXPECTED = re.compile(r"Expected `(?P<right>.+)`, got `(?P<wrong>.+)`")
_WORDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "a boolean",
    "array": "an array",
    "object": "an object",
    "null": "null",
}


class ClientGone(Exception):
    """The client closed its connection; nobody is there to be answered."""


def check_content_type(scope: Scope) -> None:
    """Raises: UnsupportedMediaType unless the body is said to be JSON, as it is."""
    declared = header(scope, b"content-type") or ""
    kind = declared.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise UnsupportedMediaType(f"the content type must be application/json, not {declared[:100]!r}")
    encoding = (header(scope, b"content-encoding") or "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMediaType(f"the body must not be compressed; its content encoding is {encoding[:100]!r}")


def header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


async def read_body(scope: Scope, receive: Receive, settings: FrontendSettings) -> bytes:
    """The whole body.

    Raises: BodyTooLarge as soon as it is known to be, with or without a Content-Length; InvalidRequest if it does not come; ClientGone.
    """
    max_bytes, timeout_s = settings.max_body_bytes, settings.body_timeout_s
    declared = header(scope, b"content-length")
    if declared is not None and declared.isdecimal() and int(declared) > max_bytes:
        raise BodyTooLarge(f"the body has {int(declared):,} bytes; at most {max_bytes:,} are accepted")
    try:
        async with asyncio.timeout(timeout_s):
            return await _read_chunks(receive, max_bytes)
    except TimeoutError:
        raise InvalidRequest(f"the body did not arrive within {timeout_s:g} s") from None


async def _read_chunks(receive: Receive, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > max_bytes:
            raise BodyTooLarge(f"the body has more than the {max_bytes:,} bytes that are accepted")
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


async def discard_body(receive: Receive) -> None:
    """Take in the rest of a refused body for a moment: a connection closed on unread data loses the refusal on its way."""
    size = 0
    try:
        async with asyncio.timeout(LINGER_S):
            while size <= LINGER_BYTES:
                message: Message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
                size += len(message.get("body", b""))
    except TimeoutError:
        return


def parse_body(data: bytes, kind: type[RequestT]) -> RequestT:
    """Raises: InvalidRequest, naming the field where there is one."""
    try:
        parsed: RequestT = _DECODERS[kind].decode(data)
    except msgspec.ValidationError as error:
        return _parse_again(data, kind, error)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    return parsed


def _parse_again(data: bytes, kind: type[RequestT], error: msgspec.ValidationError) -> RequestT:
    """Without the unsupported fields that ask for nothing; the slow path, for clients that send every field they know."""
    try:
        fields = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as broken:
        raise InvalidRequest(f"the body is not valid JSON: {broken}") from broken
    if not isinstance(fields, dict):
        raise InvalidRequest("the body must be a JSON object") from error
    accepted = set(kind.__struct_fields__)
    dropped = False
    for name in [name for name in fields if name in NEUTRAL_VALUES and name not in accepted]:
        if not is_neutral(name, fields.pop(name)):
            raise InvalidRequest(f"the field {name!r} is not supported yet; leave it out", param=name) from error
        dropped = True
    if not dropped:
        raise _named(error, accepted) from error
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as other:
        raise _named(other, accepted) from other


def _named(error: msgspec.ValidationError, accepted: set[str]) -> InvalidRequest:
    """The parser's message in words, with the field as `param`."""
    found = _ERROR.fullmatch(str(error))
    what, where = (found["what"], found["where"]) if found else (str(error), None)
    path = _path(where)
    if unknown := _UNKNOWN.fullmatch(what):
        name = unknown["name"]
        near = difflib.get_close_matches(name, accepted, n=1) if not path else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return InvalidRequest(f"unknown field {_join(path, name)[:200]!r}{hint}", param=_join(path, name)[:200])
    if missing := _MISSING.fullmatch(what):
        param = _join(path, missing["name"])
        return InvalidRequest(f"the field {param!r} is required", param=param)
    if expected := _EXPECTED.fullmatch(what):
        right = " or ".join(_WORDS.get(word, word) for word in expected["right"].split(" | "))
        wrong = _WORDS.get(expected["wrong"], expected["wrong"])
        return InvalidRequest(f"{path or 'the body'} must be {right}, not {wrong}", param=path or None)
    return InvalidRequest(f"{path or 'the body'}: {what}", param=path or None)


def _path(where: str | None) -> str:
    """`$.messages[0].content` as `messages[0].content`; a dictionary's values are not told apart (`logit_bias`)."""
    return "" if where is None else where.removeprefix("key in ").removeprefix("$").removeprefix(".").replace("[...]", "")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@contextlib.asynccontextmanager
async def until_gone(receive: Receive, on_gone: Callable[[], None]) -> AsyncIterator[None]:
    """Call `on_gone` as soon as the client closes its connection."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        on_gone()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
