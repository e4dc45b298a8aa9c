"""How SGLang is asked for tokens: token ids to `/generate`, and a stream of ids back. Source: SGLang 0.5.23, recorded in tests/unit/sglang.

A stream's pieces hold all tokens so far, unless the server was started with --incremental-streaming-output. Whoever goes away is seen by
SGLang two seconds later, so that requests are ended by their name. A name that still runs is refused: each try has one of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec

from polyphase.core.errors import EngineFailed, InvalidRequest, Overloaded, PeerLost, PolyphaseError, WireError
from polyphase.engines.served.dialect import Chunk, Usage
from polyphase.engines.sglang.grammars import grammar_fields
from polyphase.wire.kv import EngineOffer
from polyphase.wire.requests import Submit, TokenLogprob

_KV_LOST = "KVTransferError"  # Source: what a decode leg says of a prefill leg that failed
_Logprob = tuple[float | None, int, str | None]  # with the token's id and, if asked for, its text


class _Finish(msgspec.Struct):
    type: str
    message: str = ""
    status_code: int | None = None


class _Meta(msgspec.Struct):
    finish_reason: _Finish | None = None
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    output_token_logprobs: list[_Logprob] | None = None
    output_top_logprobs: list[list[_Logprob] | None] | None = None


class _Error(msgspec.Struct):
    message: str = ""
    code: int | None = None


class _Answer(msgspec.Struct):
    output_ids: list[int] = []
    meta_info: _Meta = msgspec.field(default_factory=_Meta)
    error: _Error | str | None = None


@dataclass(frozen=True, slots=True)
class Manners:
    """What this server does in its own way."""

    takes_priority: bool = False  # lower ones first, as ours
    is_incremental: bool = False  # pieces of a stream hold what is new
    is_deterministic: bool = False  # random numbers follow from seed and position
    takes_grammars: bool = False
    mode: str = "null"  # of disaggregation; `prefill` and `decode` servers do this half only
    rank: int | None = None  # data parallel, of several
    vocab_size: int = 1 << 32  # a token id beyond it would end the server


class GenerateDialect:
    """Implements `Dialect`."""

    path = "/generate"
    abort_path = "/abort_request"

    def __init__(self, manners: Manners) -> None:
        self._manners = manners
        self._decoder = msgspec.json.Decoder(_Answer)

    def body(self, request: Submit, max_tokens: int) -> bytes:
        """Raises: RequestError for what SGLang must not see; EngineFailed for what this server cannot do."""
        return msgspec.json.encode({**self.fields(request, max_tokens), **self._partner(request), "stream": True})

    def _partner(self, request: Submit) -> dict[str, Any]:
        """Of a decode leg: where its prompt is computed."""
        if self._manners.mode == "decode" and isinstance(request.offer, EngineOffer):
            return request.offer.params
        if self._manners.mode != "null":
            raise EngineFailed(f"this SGLang does the {self._manners.mode} half only, and cannot serve a request whole")
        return {}

    def abort_body(self, request: Submit) -> bytes:
        return msgspec.json.encode({"rid": request.request_id})

    def fields(self, request: Submit, max_tokens: int) -> dict[str, Any]:
        if max(request.token_ids) >= self._manners.vocab_size or min(request.token_ids) < 0:
            raise InvalidRequest(f"a token id is not in the model's vocabulary of {self._manners.vocab_size}")
        fields: dict[str, Any] = {
            "rid": request.request_id,
            "input_ids": request.token_ids,
            "sampling_params": self._sampling(request, max_tokens),
        }
        if request.sampling.top_logprobs is not None:
            fields |= {"return_logprob": True, "top_logprobs_num": request.sampling.top_logprobs}
        if self._manners.rank is not None:
            fields["routed_dp_rank"] = self._manners.rank
        if request.cache_salt:
            fields["cache_salt"] = request.cache_salt
        if request.lora:
            fields["lora_path"] = request.lora
        if self._manners.takes_priority:
            fields["priority"] = request.priority  # always: one that has none comes last
        return fields

    def _sampling(self, request: Submit, max_tokens: int) -> dict[str, Any]:
        """Our sampling parameters and stop conditions in SGLang's words.

        Stop strings stay with us: they are found in the same text that the client sees, also across a migration.
        """
        sampling, stop = request.sampling, request.stop
        already = len(request.token_ids) - request.prompt_token_count
        fields: dict[str, Any] = {
            "max_new_tokens": max_tokens,
            "min_new_tokens": min(max(0, stop.min_tokens - already), max_tokens),
            "ignore_eos": stop.ignore_eos,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "repetition_penalty": sampling.repetition_penalty,
        }
        if stop.stop_token_ids:
            fields["stop_token_ids"] = stop.stop_token_ids
        if sampling.logit_bias:
            fields["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias.items()}
        if self._manners.is_deterministic and sampling.temperature > 0:
            fields["sampling_seed"] = sampling.seed & ((1 << 31) - 1)
        if request.grammar is not None:
            if not self._manners.takes_grammars:
                raise InvalidRequest("this SGLang was started without a grammar backend; it cannot hold its output to a grammar")
            if already:
                raise EngineFailed("SGLang cannot go on in the middle of a grammar, with what was emitted elsewhere")
            fields |= grammar_fields(request.grammar)
        return fields

    def read(self, data: bytes) -> Chunk:
        try:
            answer = self._decoder.decode(data)
        except msgspec.DecodeError as error:
            raise WireError(f"SGLang sent what is no piece of an answer ({error}): {data[:200]!r}") from error
        if answer.error is not None:
            return Chunk(error=_error(answer.error))
        meta = answer.meta_info
        finish = meta.finish_reason
        if finish is not None and finish.type == "abort":
            return Chunk(error=error_of(finish.status_code, finish.message))  # a token that may come with it was never computed
        return Chunk(
            token_ids=answer.output_ids,
            logprobs=_logprobs(meta),
            finish=finish.type if finish is not None else None,
            usage=Usage(meta.prompt_tokens, meta.cached_tokens) if finish is not None else None,
            is_whole=not self._manners.is_incremental,
        )


def _logprobs(meta: _Meta) -> list[TokenLogprob]:
    found = meta.output_token_logprobs or []
    tops = meta.output_top_logprobs or [None] * len(found)
    return [TokenLogprob(token_id, _number(value), _best_first(top or [])) for (value, token_id, _), top in zip(found, tops, strict=False)]


def _best_first(found: list[_Logprob]) -> list[tuple[int, float]]:
    return sorted(((token_id, _number(value)) for value, token_id, _ in found), key=lambda pair: -pair[1])


def _number(value: float | None) -> float:
    return value if value is not None else float("-inf")


def _error(error: _Error | str) -> PolyphaseError:
    return error_of(HTTPStatus.BAD_REQUEST, error) if isinstance(error, str) else error_of(error.code, error.message)


def error_of(code: int | None, message: str) -> PolyphaseError:
    """What SGLang means when it breaks a request off. Without a code somebody has aborted it there."""
    said = message or "no reason given"
    if _KV_LOST in said:
        return PeerLost(f"the KV of the prompt did not come to this sglang: {said}")
    if code in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        return Overloaded(f"sglang takes no more requests now: {said}")
    if code is not None and 400 <= code < 500:
        return InvalidRequest(f"sglang refused the request: {said}")
    return EngineFailed(f"sglang broke the request off: {said}")
