"""How vLLM is asked for tokens: over `/inference/v1/generate`, where it has that, else over completions with token ids.

Both stream. Source: vLLM 0.32.0, recorded in tests/unit/vllm/recorded.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec
import xxhash

from polyphase.core.errors import EngineFailed, InvalidRequest, Overloaded, PolyphaseError, WireError
from polyphase.engines.served.dialect import Chunk, Dialect, Usage
from polyphase.wire.kv import EngineOffer
from polyphase.wire.requests import Grammar, GrammarKind, Submit, TokenLogprob

_TOKEN_ID_PREFIX = "token_id:"  # Source: `return_tokens_as_token_ids`
_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Error(msgspec.Struct):
    message: str = ""
    code: int | str | None = None


class _Logprob(msgspec.Struct):
    token_id: int
    logprob: float
    top_logprobs: list[_Logprob] = []


class _Logprobs(msgspec.Struct):
    content: list[_Logprob] | None = None


class _GenerateChoice(msgspec.Struct):
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: _Logprobs | None = None


class _GenerateChunk(msgspec.Struct):
    choices: list[_GenerateChoice] = []
    usage: _Usage | None = None
    error: _Error | None = None
    kv_transfer_params: dict[str, Any] | None = None  # of whole answers only


class _TextLogprobs(msgspec.Struct):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class _CompletionChoice(msgspec.Struct):
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: _TextLogprobs | None = None


class _CompletionChunk(msgspec.Struct):
    choices: list[_CompletionChoice] = []
    usage: _Usage | None = None
    error: _Error | None = None
    kv_transfer_params: dict[str, Any] | None = None


class VllmDialect(Dialect, Protocol):
    """Either of the two."""

    def prefill_body(self, request: Submit, transfer: dict[str, Any]) -> bytes:
        """JSON for an answer of one token in one piece, whatever that token is. `transfer`: what the connector is to do."""


class GenerateDialect:
    """Token-in/token-out; vLLM does not detokenise at all."""

    path = "/inference/v1/generate"

    def __init__(self, model: str, *, takes_priority: bool) -> None:
        self._model = model
        self._takes_priority = takes_priority
        self._decoder = msgspec.json.Decoder(_GenerateChunk)

    def body(self, request: Submit, max_tokens: int) -> bytes:
        return msgspec.json.encode({**self._fields(request, sampling_fields(request, max_tokens)), **_STREAMED})

    def prefill_body(self, request: Submit, transfer: dict[str, Any]) -> bytes:
        fields = self._fields(request, _prefill_sampling_fields(request))
        return msgspec.json.encode({**fields, "stream": False, "kv_transfer_params": transfer})

    def _fields(self, request: Submit, sampling: dict[str, Any]) -> dict[str, Any]:
        sampling["detokenize"] = False
        if request.sampling.top_logprobs is not None:
            sampling["logprobs"] = request.sampling.top_logprobs
        return {
            "model": request.lora or self._model,  # vLLM knows an adapter by its name
            "request_id": request.request_id,
            "token_ids": request.token_ids,
            "sampling_params": sampling,
            **_common_fields(request, takes_priority=self._takes_priority),
        }

    def read(self, data: bytes) -> Chunk:
        chunk = _decode(self._decoder, data)
        if chunk.error is not None:
            return Chunk(error=_error(chunk.error))
        usage = _usage(chunk.usage)
        if not chunk.choices:
            return Chunk(usage=usage)
        choice, params = chunk.choices[0], chunk.kv_transfer_params
        content = (choice.logprobs.content if choice.logprobs is not None else None) or []
        logprobs = [TokenLogprob(one.token_id, one.logprob, _best_first(_pairs(one.top_logprobs))) for one in content]
        return Chunk(choice.token_ids or (), logprobs, choice.finish_reason, choice.stop_reason, usage, offer_params=params)


class CompletionsDialect:
    """For servers without the above: `/v1/completions` with a list of ids as prompt, and ids in the answer."""

    path = "/v1/completions"

    def __init__(self, model: str, *, takes_priority: bool) -> None:
        self._model = model
        self._takes_priority = takes_priority
        self._decoder = msgspec.json.Decoder(_CompletionChunk)

    def body(self, request: Submit, max_tokens: int) -> bytes:
        return msgspec.json.encode({**self._fields(request, sampling_fields(request, max_tokens)), **_STREAMED})

    def prefill_body(self, request: Submit, transfer: dict[str, Any]) -> bytes:
        fields = self._fields(request, _prefill_sampling_fields(request))
        return msgspec.json.encode({**fields, "stream": False, "kv_transfer_params": transfer})

    def _fields(self, request: Submit, sampling: dict[str, Any]) -> dict[str, Any]:
        fields = {
            "model": request.lora or self._model,  # vLLM knows an adapter by its name
            "prompt": request.token_ids,
            **sampling,
            **_common_fields(request, takes_priority=self._takes_priority),
            "return_token_ids": True,
        }
        if request.sampling.top_logprobs is not None:
            fields |= {"logprobs": request.sampling.top_logprobs, "return_tokens_as_token_ids": True}
        return fields

    def read(self, data: bytes) -> Chunk:
        chunk = _decode(self._decoder, data)
        if chunk.error is not None:
            return Chunk(error=_error(chunk.error))
        usage = _usage(chunk.usage)
        if not chunk.choices:
            return Chunk(usage=usage)
        choice = chunk.choices[0]
        if choice.token_ids is None and choice.finish_reason is None:
            raise WireError("this vLLM does not tell token ids over /v1/completions (return_token_ids); it is too old for Polyphase")
        token_ids = choice.token_ids or []
        logprobs = _named_logprobs(token_ids, choice.logprobs)
        params = chunk.kv_transfer_params
        return Chunk(token_ids, logprobs, choice.finish_reason, choice.stop_reason, usage, offer_params=params)


def sampling_fields(request: Submit, max_tokens: int) -> dict[str, Any]:
    """Our sampling parameters and stop conditions in vLLM's words, of which both ways to ask have the same.

    Stop strings stay with us: they are found in the same text that the client sees, also across a migration. What was emitted elsewhere
    is a prompt to vLLM, so a sampled request goes on with another seed, else it would repeat the random numbers of its beginning.
    """
    sampling, stop = request.sampling, request.stop
    already = len(request.token_ids) - request.prompt_token_count
    fields: dict[str, Any] = {
        "max_tokens": max_tokens,
        "min_tokens": min(max(0, stop.min_tokens - already), max_tokens),
        "ignore_eos": stop.ignore_eos,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
    }
    if stop.stop_token_ids:
        fields["stop_token_ids"] = stop.stop_token_ids
    if sampling.temperature > 0:
        fields["seed"] = _seed(sampling.seed, already)
    if sampling.logit_bias:
        fields["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias.items()}
    if request.grammar is not None:
        fields["structured_outputs"] = _structured_outputs(request.grammar)
    return fields


def _prefill_sampling_fields(request: Submit) -> dict[str, Any]:
    """For the one token of a prefill leg, at which nothing may stop: older versions keep no blocks of a sequence that has ended."""
    return {**sampling_fields(request, 1), "ignore_eos": True, "stop_token_ids": []}


def _structured_outputs(grammar: Grammar) -> dict[str, Any]:
    """Source: vLLM's StructuredOutputsParams, which both ways to ask have under this name since 0.11."""
    match grammar.kind:
        case GrammarKind.JSON:
            return {"json_object": True}
        case GrammarKind.JSON_SCHEMA:
            return {"json": grammar.text}
        case GrammarKind.REGEX:
            return {"regex": grammar.text}
        case GrammarKind.CHOICE:
            return {"choice": msgspec.json.decode(grammar.text)}
        case GrammarKind.EBNF:
            return {"grammar": grammar.text}


def _seed(seed: int, already: int) -> int:
    """Below 2**63, which is what vLLM takes."""
    mixed = seed if not already else xxhash.xxh3_64_intdigest(f"{seed}:{already}".encode())
    return mixed & ((1 << 63) - 1)


def _common_fields(request: Submit, *, takes_priority: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if isinstance(request.offer, EngineOffer):
        fields["kv_transfer_params"] = request.offer.params
    if request.cache_salt:
        fields["cache_salt"] = request.cache_salt
    if takes_priority and request.priority:
        fields["priority"] = request.priority
    return fields


def _decode(decoder: msgspec.json.Decoder[Any], data: bytes) -> Any:
    try:
        return decoder.decode(data)
    except msgspec.DecodeError as error:
        raise WireError(f"vLLM sent what is no chunk of an answer ({error}): {data[:200]!r}") from error


def _usage(usage: _Usage | None) -> Usage | None:
    if usage is None:
        return None
    return Usage(usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details is not None else None)


def _error(error: _Error) -> PolyphaseError:
    told = str(error.code)
    code = int(told) if told.isdigit() else 500
    if code in (429, 503):
        return Overloaded(f"vllm takes no more requests now: {error.message}")
    if 400 <= code < 500:
        return InvalidRequest(f"vllm refused the request: {error.message}")
    return EngineFailed(f"vllm failed: {error.message or 'no reason given'}")


def _pairs(found: list[_Logprob]) -> list[tuple[int, float]]:
    return [(one.token_id, one.logprob) for one in found]


def _best_first(pairs: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return sorted(pairs, key=lambda pair: -pair[1])


def _named_logprobs(token_ids: list[int], found: _TextLogprobs | None) -> list[TokenLogprob]:
    if found is None:
        return []
    tops = found.top_logprobs or [None] * len(token_ids)
    return [
        TokenLogprob(token_id, logprob if logprob is not None else float("-inf"), _best_first(_ids(top or {})))
        for token_id, logprob, top in zip(token_ids, found.token_logprobs, tops, strict=False)
    ]


def _ids(top: dict[str, float]) -> list[tuple[int, float]]:
    named = {name.removeprefix(_TOKEN_ID_PREFIX): logprob for name, logprob in top.items() if name.startswith(_TOKEN_ID_PREFIX)}
    return [(int(name), logprob) for name, logprob in named.items()]


def dialect_of(model: str, *, has_generate: bool, takes_priority: bool) -> VllmDialect:
    kind = GenerateDialect if has_generate else CompletionsDialect
    return kind(model, takes_priority=takes_priority)
