"""One request at an engine server, from its body to its last token; and what it has to tell that was not reported yet."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from polyphase.core.errors import PolyphaseError
from polyphase.engines.batching.stopping import StopLimits, StopRule
from polyphase.engines.served.dialect import Chunk, Usage
from polyphase.wire.kv import EngineOffer
from polyphase.wire.requests import FinishReason, PhaseStats, SequenceOutput, Submit, TokenLogprob, WireFailure


@dataclass(slots=True)
class Flight:
    """`max_tokens` are those that the engine may still add: one for a prompt leg."""

    request: Submit
    max_tokens: int
    rule: StopRule
    began_ns: int  # by the engine's clock
    task: asyncio.Task[None] | None = None
    token_count: int = 0  # from this engine
    usage: Usage | None = None
    finish: FinishReason | None = None
    stop_reason: int | str | None = None
    failure: WireFailure | None = None
    made_offer: EngineOffer | None = None  # of a prefill leg
    taken_offer: EngineOffer | None = None  # of a decode leg, until it is released
    transfer: PhaseStats | None = None  # of a decode leg, to be told with its first token
    _tokens: list[int] = field(default_factory=list)
    _logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def is_whole(self) -> bool:
        """Nothing more is to come."""
        return self.finish is not None

    def take(self, chunk: Chunk) -> int:
        """Tokens of an answer; how many were new. Behind one that ends the sequence, none counts."""
        before = self.token_count
        known = before if chunk.is_whole else 0
        for place, token_id in enumerate(chunk.token_ids[known:], known):
            if self.finish is not None:
                break
            self._tokens.append(token_id)
            if place < len(chunk.logprobs):
                self._logprobs.append(chunk.logprobs[place])
            self.token_count += 1
            total = len(self.request.token_ids) + self.token_count
            stop = self.rule.after(token_id, total, total - self.request.prompt_token_count)
            if stop is not None:
                self.finish, self.stop_reason = stop.reason, stop.matched
            elif self.request.hand_over and self.token_count >= self.max_tokens:
                self.finish = FinishReason.HANDED_OVER
        self.usage = chunk.usage or self.usage
        return self.token_count - before

    @property
    def has_computed(self) -> bool:
        """The prompt."""
        return self.token_count > 0 or self.made_offer is not None

    def end(self, finish: FinishReason) -> None:
        if self.finish is None:
            self.finish = finish

    def fail(self, error: PolyphaseError) -> None:
        if self.finish is None:
            self.finish = FinishReason.ERROR
            self.failure = WireFailure(error.code, error.message, error.is_retryable)

    def take_output(self, *, has_ended: bool) -> SequenceOutput:
        """What is new since the last call. The end is told once `has_ended`: behind the last token may still come what it cost."""
        tokens, logprobs = self._tokens, self._logprobs
        self._tokens, self._logprobs = [], []
        if not has_ended:
            return SequenceOutput(
                request_id=self.request_id,
                token_ids=tokens,
                logprobs=logprobs if self.request.sampling.top_logprobs is not None else None,
                stats=self._take_stats() if isinstance(self.request.offer, EngineOffer) else None,
            )
        is_leaving = self.finish is FinishReason.HANDED_OVER
        return SequenceOutput(
            request_id=self.request_id,
            token_ids=tokens,
            logprobs=logprobs if self.request.sampling.top_logprobs is not None else None,
            finish_reason=self.finish,
            stop_reason=self.stop_reason,
            failure=self.failure,
            offer=self.made_offer if is_leaving else None,
            stats=self._take_stats(),
        )

    def note_taken(self, offer: EngineOffer, waited_ms: float) -> None:
        """The first token is there: if not computed anew, the KV was fetched while it was waited for."""
        self.transfer = PhaseStats(transferred_token_count=offer.token_count, transfer_ms=waited_ms)

    def _take_stats(self) -> PhaseStats | None:
        """Of a decode leg, engines count what the prefill leg found cached, or nothing of use."""
        if isinstance(self.request.offer, EngineOffer):
            stats, self.transfer = self.transfer, None
            return stats
        cached = self.usage.cached_tokens if self.usage is not None and self.finish is not None else None
        return None if cached is None else PhaseStats(cached_token_count=cached)


def flight_of(request: Submit, limits: StopLimits, now_ns: int) -> Flight:
    already = len(request.token_ids) - request.prompt_token_count
    room = min(request.stop.max_tokens - already, limits.context_length - len(request.token_ids))
    taken = request.offer if isinstance(request.offer, EngineOffer) else None
    return Flight(request, 1 if request.hand_over else room, StopRule(request, limits), now_ns, taken_offer=taken)
