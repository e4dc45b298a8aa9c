"""Parts of answers that both endpoints share: usage, log-probabilities, and the building of JSON around prepared envelopes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgspec

from polyphase.frontend.assembly import Piece
from polyphase.text import Tokenizer
from polyphase.wire.requests import TokenLogprob

encode = msgspec.json.Encoder().encode
LOWEST_LOGPROB = -9999.0  # JSON has no infinity. Source: vLLM's OpenAI server
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class AnswerFields:
    """What an answer says of itself."""

    answer_id: str
    model: str
    created_unix_s: int


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
        total = prompt_tokens + completion_tokens
        return cls(prompt_tokens, completion_tokens, total, PromptTokensDetails(min(cached_tokens, prompt_tokens)))


class ChunkEnvelope:
    """What all chunks of one request have in common, encoded once: `start(index) … tail(usage)` is one server-sent event."""

    def __init__(self, fields: dict[str, Any], includes_usage: bool) -> None:
        head = b"data: " + encode(fields)[:-1]
        self._head = head + b',"choices":[{"index":'
        self._usage_head = head + b',"choices":[],"usage":'
        # OpenAI: where usage is asked for, it is null in all chunks but the last.
        self._tail = b',"usage":null}\n\n' if includes_usage else b"}\n\n"

    def start(self, index: int) -> bytes:
        return self._head + b"%d" % index

    def tail(self, usage: Usage | None) -> bytes:
        return self._tail if usage is None else b',"usage":' + encode(usage) + b"}\n\n"

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._usage_head + encode(usage) + b"}\n\n"


def finish_fields(piece: Piece) -> bytes:
    stop = b',"stop_reason":' + encode(piece.stop_reason) if piece.stop_reason is not None else b""
    return b',"finish_reason":' + encode(piece.finish_reason) + stop


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) and logprob > LOWEST_LOGPROB else LOWEST_LOGPROB


def chat_logprobs(logprobs: list[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """OpenAI's form for chat: one entry per token, with the bytes that it stands for."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id) or b""
        return {"token": data.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(data)}

    return {
        "content": [
            {**entry(item.token_id, item.logprob), "top_logprobs": [entry(token_id, value) for token_id, value in item.top]}
            for item in logprobs
        ],
        "refusal": None,
    }


class CompletionLogprobs:
    """OpenAI's older form for completions: four lists side by side; `text_offset` goes on from piece to piece."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def of(self, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        tokens = [self._tokenizer.token_text(item.token_id) for item in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [finite(item.logprob) for item in logprobs],
            "top_logprobs": [self._top(item) for item in logprobs],
            "text_offset": offsets,
        }

    def _top(self, item: TokenLogprob) -> dict[str, float] | None:
        """The most probable tokens and the chosen one; two ids with the same text show as one, with the higher value."""
        if not item.top:
            return None
        found: dict[str, float] = {}
        for token_id, value in [*item.top, (item.token_id, item.logprob)]:
            text = self._tokenizer.token_text(token_id)
            found[text] = max(finite(value), found.get(text, LOWEST_LOGPROB))
        return found
