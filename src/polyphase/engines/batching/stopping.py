"""When a sequence ends: end-of-sequence tokens, stop tokens, stop strings, and lengths."""

from __future__ import annotations

from dataclasses import dataclass

from polyphase.text import IncrementalDetokenizer, StopStringMatcher, Tokenizer
from polyphase.wire.requests import FinishReason, Submit

_CONTEXT_TOKENS = 16  # of the prompt; the detokenizer looks at no more


@dataclass(frozen=True, slots=True)
class Stop:
    reason: FinishReason
    matched: int | str | None = None  # stop token or stop string; None for EOS and lengths


@dataclass(frozen=True, slots=True)
class StopLimits:
    """What the model adds to a request's own conditions."""

    eos_token_ids: frozenset[int]
    context_length: int
    tokenizer: Tokenizer


class StopRule:
    """Follows one sequence's output. The token that ends a sequence is part of its output.

    `min_tokens` holds back EOS and stop tokens (they are not even sampled until then), but not stop strings, which a frontend that looks
    at the same text could not know to ignore.
    """

    __slots__ = ("_conditions", "_eos", "_stop_ids", "_text", "end_token_count", "is_by_length")

    def __init__(self, request: Submit, limits: StopLimits) -> None:
        self._conditions = request.stop
        self._eos = frozenset[int]() if request.stop.ignore_eos else limits.eos_token_ids
        self._stop_ids = frozenset(request.stop.stop_token_ids)
        self._text: _StopText | None = None
        if request.stop.stop_strings:
            self._text = _StopText(request, limits.tokenizer)
        # Tokens, the prompt's included, with which there is no room for a further one.
        self.end_token_count = min(request.prompt_token_count + request.stop.max_tokens, limits.context_length)
        # Whether it does not matter which tokens come, only how many.
        self.is_by_length = self._text is None and request.grammar is None and not self._stop_ids and not self._eos

    def forbidden_ids(self, output_count: int) -> frozenset[int]:
        """Tokens that may not be sampled as output number `output_count`, because the sequence would end too early."""
        if output_count >= self._conditions.min_tokens:
            return frozenset()
        return self._eos | self._stop_ids

    def at_length(self, token_count: int) -> Stop | None:
        """Whether there is no room for a further token."""
        return Stop(FinishReason.LENGTH) if token_count >= self.end_token_count else None

    def after(self, token_id: int, token_count: int, output_count: int) -> Stop | None:
        """Look at a new token; the counts include it."""
        matched = self._text.push(token_id) if self._text is not None else None
        if output_count >= self._conditions.min_tokens:
            if token_id in self._stop_ids:
                return Stop(FinishReason.STOP, token_id)
            if token_id in self._eos:
                return Stop(FinishReason.STOP)
        if matched is not None:
            return Stop(FinishReason.STOP, matched)
        return self.at_length(token_count)


class _StopText:
    """Detokenises exactly as the frontend does, so that both see the same match."""

    __slots__ = ("_detokenizer", "_matcher")

    def __init__(self, request: Submit, tokenizer: Tokenizer) -> None:
        prompt_count = request.prompt_token_count
        context = request.token_ids[max(0, prompt_count - _CONTEXT_TOKENS) : prompt_count]
        self._detokenizer = IncrementalDetokenizer(tokenizer, context)
        self._matcher = StopStringMatcher(request.stop.stop_strings)
        # Output of another worker has not matched, but its end may be the beginning of a match.
        self._matcher.push(self._detokenizer.push(request.token_ids[prompt_count:]))

    def push(self, token_id: int) -> str | None:
        return self._matcher.push(self._detokenizer.push([token_id]))[1]
