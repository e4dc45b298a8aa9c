"""Answers of /v1/chat/completions as JSON, whole and in chunks."""

from __future__ import annotations

from typing import Any

from polyphase.frontend.answers import AnswerFields, ChunkEnvelope, Usage, chat_logprobs, encode, finish_fields
from polyphase.frontend.assembly import Piece
from polyphase.frontend.prompts import Prompt
from polyphase.frontend.validation import Wishes
from polyphase.text import Tokenizer


class ChatFormat:
    """Of one request; implements `endpoints.AnswerFormat`."""

    def __init__(self, fields: AnswerFields, wishes: Wishes, prompts: list[Prompt], tokenizer: Tokenizer) -> None:
        self._fields = {"id": fields.answer_id, "object": "chat.completion", "created": fields.created_unix_s, "model": fields.model}
        self._envelope = ChunkEnvelope({**self._fields, "object": "chat.completion.chunk"}, wishes.include_usage)
        self._wishes = wishes
        self._prompt_ids = prompts[0].token_ids
        self._tokenizer = tokenizer
        self._opened: set[int] = set()

    def chunks(self, piece: Piece, usage: Usage | None) -> bytes:
        """Server-sent events for one piece: the role before the first, the finish reason after the last."""
        start, tail = self._envelope.start(piece.index), self._envelope.tail(usage)
        with_ids = self._wishes.return_token_ids
        events: list[bytes] = []
        if piece.index not in self._opened:
            prompt = b',"prompt_token_ids":' + encode(self._prompt_ids) if with_ids and not self._opened else b""
            self._opened.add(piece.index)
            role = b',"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
            events.append(start + role + prompt + tail)
        if piece.text or piece.logprobs or (with_ids and piece.token_ids):
            logprobs = encode(chat_logprobs(piece.logprobs, self._tokenizer)) if piece.logprobs else b"null"
            ids = b',"token_ids":' + encode(piece.token_ids) if with_ids else b""
            delta = b',"delta":{"content":' + encode(piece.text) + b'},"logprobs":' + logprobs + b',"finish_reason":null'
            events.append(start + delta + ids + b"}]" + tail)
        if piece.finish_reason is not None:
            events.append(start + b',"delta":{},"logprobs":null' + finish_fields(piece) + b"}]" + tail)
        return b"".join(events)

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._envelope.usage_chunk(usage)

    def whole(self, pieces: list[Piece], usage: Usage) -> bytes:
        answer = {**self._fields, "choices": [self._choice(piece) for piece in pieces], "usage": usage}
        if self._wishes.return_token_ids:
            answer["prompt_token_ids"] = self._prompt_ids
        return encode(answer)

    def _choice(self, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": piece.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": chat_logprobs(piece.logprobs, self._tokenizer) if self._wishes.wants_logprobs else None,
            "finish_reason": piece.finish_reason,
        }
        if piece.stop_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        if self._wishes.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice
