"""The model's name in bodies and answers: what clients call it goes out, what the engine calls it comes in. All else stays, byte for byte.

Of answers, the name is put right and what they tell of their end and their cost is read on the way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from polyphase.core.errors import InvalidRequest, WireError
from polyphase.engines.served.sse import DONE, MAX_EVENT_BYTES
from polyphase.wire.requests import PassedUsage

_objects = msgspec.json.Decoder(dict[str, msgspec.Raw])
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"')


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Answer(msgspec.Struct):
    usage: _Usage | None = None


_answers = msgspec.json.Decoder(_Answer)


def with_model(body: bytes, name: str, span: tuple[int, int] | None) -> bytes:
    """The body that asks for the model under this name. `span`: where a body that is not JSON has it. Raises: InvalidRequest."""
    if span is not None:
        return body[: span[0]] + name.encode() + body[span[1] :]
    try:
        fields = _objects.decode(body)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not a JSON object: {error}") from error
    return msgspec.json.encode({**fields, "model": name})


class AnswerModel:
    """Puts the name of the served model in place of the engine's."""

    def __init__(self, served: str, upstream: str) -> None:
        self._served = msgspec.Raw(msgspec.json.encode(served))
        self._upstream = upstream
        self._is_same = served == upstream

    def in_json(self, data: bytes) -> bytes:
        """What is no JSON object, or names another model, stays as it is."""
        if self._is_same or b'"model"' not in data:
            return data
        try:
            fields = _objects.decode(data)
            if "model" not in fields or msgspec.json.decode(fields["model"]) != self._upstream:
                return data
        except msgspec.DecodeError:
            return data
        return msgspec.json.encode({**fields, "model": self._served})


def usage_in(data: bytes) -> PassedUsage | None:
    """Of an answer, or of a chunk, that tells it."""
    if b'"usage"' not in data:
        return None
    try:
        usage = _answers.decode(data).usage
    except msgspec.DecodeError:
        return None
    if usage is None:
        return None
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details is not None else None
    return PassedUsage(usage.prompt_tokens or 0, usage.completion_tokens or 0, cached or 0)


class EventRewriter:
    """Server-sent events as they come, wherever they are cut, with the model's name put right. Whole lines come out."""

    def __init__(self, model: AnswerModel) -> None:
        self._model = model
        self._rest = b""
        self.usage: PassedUsage | None = None
        self.has_ended = False  # as generation does: with [DONE], or a reason why a choice is whole

    def push(self, received: bytes) -> bytes:
        """Raises: WireError for a line beyond `MAX_EVENT_BYTES`."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise WireError(f"the engine sent a line of more than {MAX_EVENT_BYTES} bytes")
        return b"".join(self._rewritten(lines))

    def rest(self) -> bytes:
        """What came behind the last end of a line."""
        rest, self._rest = self._rest, b""
        return rest

    def _rewritten(self, lines: list[bytes]) -> Iterator[bytes]:
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == DONE or _FINISH.search(data):
                    self.has_ended = True
                self.usage = usage_in(data) or self.usage
                renamed = self._model.in_json(data)
                if renamed is not data:
                    yield b"data: " + renamed + b"\n"
                    continue
            yield line + b"\n"
