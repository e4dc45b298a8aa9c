"""Answers of /v1/completions as JSON, whole and in chunks."""

from __future__ import annotations

from typing import Any

from polyphase.frontend.answers import AnswerFields, ChunkEnvelope, CompletionLogprobs, Usage, encode, finish_fields
from polyphase.frontend.assembly import Piece
from polyphase.frontend.prompts import Prompt
from polyphase.frontend.validation import Wishes
from polyphase.text import Tokenizer


class CompletionFormat:
    """Of one request; implements `endpoints.AnswerFormat`. Choice `i` belongs to prompt `i // n`."""

    def __init__(self, fields: AnswerFields, wishes: Wishes, prompts: list[Prompt], tokenizer: Tokenizer) -> None:
        self._fields = {"id": fields.answer_id, "object": "text_completion", "created": fields.created_unix_s, "model": fields.model}
        self._envelope = ChunkEnvelope(self._fields, wishes.include_usage)
        self._wishes = wishes
        self._prompts = prompts
        self._logprobs = [CompletionLogprobs(tokenizer) for _ in range(len(prompts) * wishes.choice_count)]
        self._opened: set[int] = set()

    def chunks(self, piece: Piece, usage: Usage | None) -> bytes:
        """Server-sent events for one piece; the prompt before the first if it is to be echoed, the finish reason after the last."""
        start, tail = self._envelope.start(piece.index), self._envelope.tail(usage)
        with_ids = self._wishes.return_token_ids
        text = piece.text
        ids = b',"token_ids":' + encode(piece.token_ids) if with_ids else b""
        if piece.index not in self._opened:
            self._opened.add(piece.index)
            prompt = self._prompt_of(piece.index)
            text = prompt.echo + text
            if with_ids:
                ids += b',"prompt_token_ids":' + encode(prompt.token_ids)
        events: list[bytes] = []
        if text or piece.logprobs or (with_ids and piece.token_ids):
            logprobs = encode(self._logprobs[piece.index].of(piece.logprobs)) if piece.logprobs else b"null"
            body = b',"text":' + encode(text) + b',"logprobs":' + logprobs + b',"finish_reason":null'
            events.append(start + body + ids + b"}]" + tail)
        if piece.finish_reason is not None:
            ids = b',"token_ids":[]' if with_ids else b""
            events.append(start + b',"text":"","logprobs":null' + finish_fields(piece) + ids + b"}]" + tail)
        return b"".join(events)

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._envelope.usage_chunk(usage)

    def whole(self, pieces: list[Piece], usage: Usage) -> bytes:
        return encode({**self._fields, "choices": [self._choice(piece) for piece in pieces], "usage": usage})

    def _choice(self, piece: Piece) -> dict[str, Any]:
        prompt = self._prompt_of(piece.index)
        choice: dict[str, Any] = {
            "index": piece.index,
            "text": prompt.echo + piece.text,
            "logprobs": self._logprobs[piece.index].of(piece.logprobs) if self._wishes.wants_logprobs else None,
            "finish_reason": piece.finish_reason,
        }
        if piece.stop_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        if self._wishes.return_token_ids:
            choice["token_ids"] = piece.token_ids
            choice["prompt_token_ids"] = prompt.token_ids
        return choice

    def _prompt_of(self, index: int) -> Prompt:
        return self._prompts[index // self._wishes.choice_count]
