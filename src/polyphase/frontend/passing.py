"""Requests that tokens cannot carry: which body asks for what, and what the router is told of it.

    embeddings, rerank, score, classify, audio          always
    a conversation with images, sounds or films          for whatever model
    anything for a model whose workers take no tokens    text goes to the engine as text

Of a body only the fields are read that routing needs; what the engine makes of the rest is its business. Where workers hold text, a
prompt has blocks as well: its bytes in fours, for tokens that nobody here knows. So a conversation finds the server that has its beginning.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import xxhash

from polyphase.core.errors import InvalidRequest
from polyphase.core.hashing import sequence_hashes
from polyphase.core.ids import SequenceHash
from polyphase.wire.cards import RequestKind

WINDOW_BYTES = 256 * 1024  # of one answer, between the worker and the client
MAX_BODY_BYTES = 48 << 20  # what fits the request channel with room for the rest
BYTES_PER_TOKEN = 4  # about what a token of English is
TOKENS_PER_MEDIUM = 512  # about what an image costs a prompt
DEFAULT_OUTPUT_TOKENS = 256  # for the booking, where the client says nothing
MAX_HEADERS, MAX_HEADER_BYTES = 32, 8192

GENERATING = frozenset({RequestKind.CHAT, RequestKind.COMPLETIONS})
_PART_KINDS = {
    "image_url": RequestKind.IMAGES,
    "input_image": RequestKind.IMAGES,
    "input_audio": RequestKind.AUDIO,
    "audio_url": RequestKind.AUDIO,
    "video_url": RequestKind.VIDEO,
}
_MARKS = tuple(f'"{name}"'.encode() for name in _PART_KINDS)  # cannot stand inside a string of JSON, where quotes are escaped
_CARRIED = frozenset({b"accept", b"accept-language", b"traceparent", b"tracestate", b"baggage"})
_NOT_CARRIED = (b"auth", b"key", b"token", b"secret", b"cookie", b"password", b"credential", b"signature", b"session")
_OWN = (b"x-request-id", b"x-forwarded", b"x-real-ip", b"x-polyphase", b"x-stainless", b"x-amz", b"x-goog")


@dataclass(frozen=True, slots=True)
class Passing:
    """A body on its way to an engine. `kinds`: the first one says where it goes, the others what it holds besides."""

    model: str  # as the client calls it
    kinds: list[str]
    body: bytes
    content_type: str
    wants_stream: bool
    prompt_token_count: int  # a guess
    max_output_tokens: int
    hashes: list[SequenceHash]
    priority: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    model_span: tuple[int, int] | None = None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self.kinds)

    @property
    def shown_kinds(self) -> str:
        """What it is for, in short: `images`, `embeddings`."""
        return ", ".join(sorted(self.kinds[1:])) or self.kinds[0]


@dataclass(frozen=True, slots=True)
class Asked:
    """What of a request's body concerns us."""

    model: str
    wants_stream: bool
    user: str | None
    prompt_cache_key: str | None
    cache_salt: str | None
    fields: Mapping[str, Any]  # all of them, as the client wrote them; of a form, those that are text
    model_span: tuple[int, int] | None = None


def may_hold_media(body: bytes) -> bool:
    """Whether it is worth looking for them. Cost: a search of the bytes, so that ordinary requests do not pay."""
    return any(mark in body for mark in _MARKS)


def asked_in_json(body: bytes) -> Asked:
    """Raises: InvalidRequest."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequest("the body must be a JSON object")
    return asked_in(fields)


def asked_in(fields: Mapping[str, Any], model_span: tuple[int, int] | None = None) -> Asked:
    """Raises: InvalidRequest for what routing needs and cannot use."""
    model, stream = fields.get("model"), fields.get("stream")
    if not isinstance(model, str):
        raise InvalidRequest("the field 'model' is required" if model is None else "model must be a string", param="model")
    if stream not in (None, True, False, "true", "false"):
        raise InvalidRequest("stream must be a boolean", param="stream")
    user, key, salt = (_text(fields.get(name)) for name in ("user", "prompt_cache_key", "cache_salt"))
    return Asked(model, stream in (True, "true"), user, key, salt, fields, model_span)


def media_in(fields: Mapping[str, Any]) -> dict[str, str]:
    """Kinds of media in a conversation, each with the path of the first part of its kind."""
    found: dict[str, str] = {}
    for at, message in enumerate(_list(fields.get("messages"))):
        content = message.get("content") if isinstance(message, dict) else None
        for place, part in enumerate(_list(content)):
            kind = _PART_KINDS.get(str(part.get("type"))) if isinstance(part, dict) else None
            if kind is not None:
                found.setdefault(kind, f"messages[{at}].content[{place}]")
    return found


def passing_of(kind: str, asked: Asked, body: bytes, content_type: str, headers: list[tuple[str, str]], block_size: int | None) -> Passing:
    """`block_size`: of workers that hold text; None where what they hold cannot be told from a body."""
    fields = asked.fields
    media = sorted(media_in(fields)) if kind == RequestKind.CHAT else []
    text, media_count = _prompt_text(kind, fields)
    token_count = _estimate(text, body) + TOKENS_PER_MEDIUM * media_count
    return Passing(
        model=asked.model,
        kinds=[kind, *media],
        body=body,
        content_type=content_type,
        wants_stream=asked.wants_stream,
        prompt_token_count=token_count,
        max_output_tokens=_output_tokens(fields) if kind in GENERATING else 1,
        hashes=text_hashes(text, block_size, asked.cache_salt) if block_size is not None and text is not None else [],
        priority=_whole(fields.get("priority")),
        headers=headers,
        model_span=asked.model_span,
    )


def text_hashes(text: bytes, block_size: int, salt: str | None) -> list[SequenceHash]:
    """Sequence hashes of a text, whose tokens are not known, in blocks of `block_size` times four bytes."""
    words = array("I")
    words.frombytes(text[: len(text) // BYTES_PER_TOKEN * BYTES_PER_TOKEN])
    return sequence_hashes(words, block_size, salt)


def carried_headers(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    """Those of a client that an engine may see: what describes the request, and `x-` headers that hold no secret and are not ours.

    Connections, cookies, keys and who the client is end here. What is long or many is left out.
    """
    found: list[tuple[str, str]] = []
    size = 0
    for name, value in headers:
        is_other = name.startswith(b"x-") and not name.startswith(_OWN) and not any(word in name for word in _NOT_CARRIED)
        size += len(name) + len(value)
        if (name in _CARRIED or is_other) and len(found) < MAX_HEADERS and size <= MAX_HEADER_BYTES:
            found.append((name.decode("latin-1"), value.decode("latin-1")))
    return found


def _prompt_text(kind: str, fields: Mapping[str, Any]) -> tuple[bytes | None, int]:
    """What a generating request begins with, so that a longer conversation begins with the same bytes; and how many media are in it."""
    if kind == RequestKind.COMPLETIONS:
        prompt = fields.get("prompt")
        return (prompt.encode("utf-8", "surrogatepass") if isinstance(prompt, str) else _json(prompt)), 0
    if kind != RequestKind.CHAT:
        return None, 0
    pieces = [_json(fields["tools"])] if fields.get("tools") else []
    media_count = 0
    for message in _list(fields.get("messages")):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            parts = [_without_media(part) for part in content]
            media_count += sum(short is not part for short, part in zip(parts, content, strict=True))
            message = {**message, "content": parts}
        pieces.append(_json(message))
    return b"\n".join(pieces), media_count


def _without_media(part: Any) -> Any:
    """An image of a megabyte is one thing to a prompt: its name is enough."""
    if isinstance(part, dict) and str(part.get("type")) in _PART_KINDS:
        return {"type": part["type"], "digest": xxhash.xxh3_64_hexdigest(_json(part))}
    return part


def _estimate(text: bytes | None, body: bytes) -> int:
    return max(1, len(body if text is None else text) // BYTES_PER_TOKEN)


def _output_tokens(fields: Mapping[str, Any]) -> int:
    wanted = _whole(fields.get("max_completion_tokens")) or _whole(fields.get("max_tokens"))
    return min(max(wanted, 1), 1 << 20) if wanted else DEFAULT_OUTPUT_TOKENS


def _json(value: Any) -> bytes:
    return msgspec.json.encode(value)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 31 else 0
