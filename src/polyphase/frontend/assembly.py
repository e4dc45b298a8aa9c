"""From the tokens of one sequence to the pieces of its text: detokenised, cut at a stop string, without the token that ended it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyphase.frontend.inbox import Arrival, End
from polyphase.frontend.models import ServedModel
from polyphase.frontend.validation import Wishes
from polyphase.text import IncrementalDetokenizer, StopStringMatcher
from polyphase.wire.requests import FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of one choice. `finish_reason` comes with the last one."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Assembler:
    """Follows one sequence. The engine looks for the same stop strings in the same way; other engines need not.

    `is_done` turns true with the last piece, which may be before the worker's own end: then the worker must be told to stop.
    """

    def __init__(self, model: ServedModel, prompt_ids: Sequence[int], wishes: Wishes) -> None:
        self._detokenizer = IncrementalDetokenizer(model.tokenizer, prompt_ids, wishes.skip_special_tokens)
        self._matcher = StopStringMatcher(wishes.stop.stop_strings, wishes.include_stop)
        self._include_stop = wishes.include_stop
        self._closing_ids = model.end_ids | frozenset(wishes.stop.stop_token_ids)
        self.token_count = 0
        self.is_done = False

    def feed(self, arrival: Arrival) -> Piece:
        """Take new tokens, and the end if it came; an end by an error is the caller's to deal with."""
        end = arrival.end
        self.token_count += len(arrival.token_ids)
        text = self._detokenizer.push(self._shown(arrival.token_ids, end))
        if end is not None:
            text += self._detokenizer.flush()
        text, matched = self._matcher.push(text)
        if end is None and matched is None:
            return Piece(arrival.index, text, arrival.token_ids, arrival.logprobs)
        self.is_done = True
        if matched is not None:
            return Piece(arrival.index, text, arrival.token_ids, arrival.logprobs, FinishReason.STOP.value, matched)
        assert end is not None
        reason = end.finish_reason.value if end.finish_reason else None
        return Piece(arrival.index, text + self._matcher.flush(), arrival.token_ids, arrival.logprobs, reason, end.stop_reason)

    def _shown(self, token_ids: list[int], end: End | None) -> list[int]:
        """Without the EOS or stop token that ended the sequence, unless the client wants to see what stopped it."""
        if end is None or end.finish_reason is not FinishReason.STOP or isinstance(end.stop_reason, str) or self._include_stop:
            return token_ids
        return token_ids[:-1] if token_ids and token_ids[-1] in self._closing_ids else token_ids
