"""How a server that takes token ids is asked for tokens: completions with a list of ids as prompt, and ids in the answer.

Of fields beyond OpenAI's own, only those are sent that the server took when it was probed; a request that needs another one is refused,
since leaving it out would be another request.
"""

from __future__ import annotations

from typing import Any

import msgspec
import xxhash

from polyphase.core.errors import EngineFailed, InvalidRequest, PolyphaseError, WireError
from polyphase.engines.openai.probe import TokenFacts
from polyphase.engines.served.access import COMPLETIONS_PATH
from polyphase.engines.served.dialect import Chunk, Usage
from polyphase.wire.requests import Submit, TokenLogprob

_TOKEN_ID_PREFIX = "token_id:"  # Source: vLLM's `return_tokens_as_token_ids`


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Error(msgspec.Struct):
    message: str = ""
    type: str | None = None
    code: int | str | None = None


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


class TokenDialect:
    path = COMPLETIONS_PATH

    def __init__(self, model: str, facts: TokenFacts) -> None:
        self._model = model
        self._facts = facts
        self._decoder = msgspec.json.Decoder(_Chunk)

    def body(self, request: Submit, max_tokens: int) -> bytes:
        """Raises: InvalidRequest for what this server cannot be asked."""
        sampling = request.sampling
        fields: dict[str, Any] = {
            "model": self._model,
            "prompt": request.token_ids,
            "max_tokens": max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            **self._beyond_openai(request, max_tokens),
        }
        if sampling.temperature > 0:
            fields["seed"] = _seed(sampling.seed, len(request.token_ids) - request.prompt_token_count)
        if sampling.presence_penalty or sampling.frequency_penalty:
            fields |= {"presence_penalty": sampling.presence_penalty, "frequency_penalty": sampling.frequency_penalty}
        if sampling.logit_bias:
            fields["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias.items()}
        if sampling.top_logprobs is not None:
            if not self._facts.has_logprobs:
                raise InvalidRequest("the server behind this model does not tell log-probabilities by token", param="logprobs")
            fields |= {"logprobs": sampling.top_logprobs, "return_tokens_as_token_ids": True}
        return msgspec.json.encode(fields)

    def _beyond_openai(self, request: Submit, max_tokens: int) -> dict[str, Any]:
        """Each with the value that asks for nothing, which is left out where the server does not know the field."""
        sampling, stop = request.sampling, request.stop
        already = len(request.token_ids) - request.prompt_token_count
        wanted: dict[str, tuple[Any, Any]] = {
            "top_k": (sampling.top_k, 0),
            "min_p": (sampling.min_p, 0.0),
            "repetition_penalty": (sampling.repetition_penalty, 1.0),
            "ignore_eos": (stop.ignore_eos, False),
            "min_tokens": (min(max(0, stop.min_tokens - already), max_tokens), 0),
            "stop_token_ids": (stop.stop_token_ids, []),
            "cache_salt": (request.cache_salt, None),
        }
        if request.grammar is not None or request.lora is not None:
            raise InvalidRequest("the server behind this model takes neither grammars nor adapters with token ids")
        # A stop token is found here as well; the server need not know it. Greedily, what narrows the choice changes nothing.
        dispensable = {"stop_token_ids"} | ({"top_k", "min_p"} if sampling.temperature == 0 else set())
        fields = {}
        for name, (value, nothing) in wanted.items():
            if name in self._facts.fields:
                if value != nothing or name in ("top_k", "min_p", "repetition_penalty"):  # its own default may be another
                    fields[name] = value
            elif value != nothing and name not in dispensable:
                raise InvalidRequest(f"the server behind this model does not know {name}; leave it out", param=name)
        return fields

    def read(self, data: bytes) -> Chunk:
        try:
            chunk = self._decoder.decode(data)
        except msgspec.DecodeError as error:
            raise WireError(f"the server sent what is no chunk of an answer ({error}): {data[:200]!r}") from error
        if chunk.error is not None:
            return Chunk(error=_error(chunk.error))
        usage = None
        if chunk.usage is not None:
            details = chunk.usage.prompt_tokens_details
            usage = Usage(chunk.usage.prompt_tokens, details.cached_tokens if details is not None else None)
        if not chunk.choices:
            return Chunk(usage=usage)
        choice = chunk.choices[0]
        ids = choice.token_ids or []
        return Chunk(ids, _named_logprobs(ids, choice.logprobs), choice.finish_reason, None, usage)


def _seed(seed: int, already: int) -> int:
    """What was emitted elsewhere is a prompt there: with the same seed, its random numbers would begin anew. Below 2**63."""
    mixed = seed if not already else xxhash.xxh3_64_intdigest(f"{seed}:{already}".encode())
    return mixed & ((1 << 63) - 1)


def _error(error: _Error) -> PolyphaseError:
    if error.type == "invalid_request_error" or str(error.code).startswith("4"):
        return InvalidRequest(f"openai refused the request: {error.message}")
    return EngineFailed(f"openai failed: {error.message or 'no reason given'}")


def _named_logprobs(token_ids: list[int], found: _Logprobs | None) -> list[TokenLogprob]:
    if found is None:
        return []
    tops = found.top_logprobs or [None] * len(token_ids)
    return [
        TokenLogprob(token_id, logprob if logprob is not None else float("-inf"), _by_id(top or {}))
        for token_id, logprob, top in zip(token_ids, found.token_logprobs, tops, strict=False)
    ]


def _by_id(top: dict[str, float]) -> list[tuple[int, float]]:
    """Most probable first."""
    named = [(int(name.removeprefix(_TOKEN_ID_PREFIX)), logprob) for name, logprob in top.items() if name.startswith(_TOKEN_ID_PREFIX)]
    return sorted(named, key=lambda pair: -pair[1])
