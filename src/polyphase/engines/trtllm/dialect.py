"""How TensorRT-LLM is asked for tokens: completions with token ids as prompt and `detokenize: false`, so that ids come back.

Its models forbid fields that they do not know, so nothing is sent that asks for nothing. Source: TensorRT-LLM's
`serve/openai_protocol.py` and `serve/postprocess_handlers.py`.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec
import xxhash

from polyphase.core.errors import EngineFailed, InvalidRequest, WireError
from polyphase.engines.served.dialect import Chunk, Usage
from polyphase.text import Tokenizer
from polyphase.wire.kv import EngineOffer
from polyphase.wire.requests import Grammar, GrammarKind, Submit, TokenLogprob

LEASE_S = 60.0  # Source: default of `kv_transfer_timeout_ms`; what becomes of blocks that nobody fetches was not seen
_LEAST_REQUEST_ID = 1 << 42  # Source: lower ones are the servers' own


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: _Logprobs | None = None
    disaggregated_params: dict[str, Any] | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    object: str = ""
    message: str | None = None  # of an error, with `object` "error"


class CompletionsDialect:
    """Implements `Dialect`, and `PrefillDialect` with context-only and generation-only requests."""

    path = "/v1/completions"
    lease_s = LEASE_S

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        self._model = model
        self._texts = TokenTexts(tokenizer)
        self._decoder = msgspec.json.Decoder(_Answer)

    def body(self, request: Submit, max_tokens: int) -> bytes:
        """Raises: InvalidRequest for what this engine has no words for."""
        fields = self._fields(request, max_tokens) | {"stream": True, "stream_options": {"include_usage": True}}
        if isinstance(request.offer, EngineOffer):
            fields["disaggregated_params"] = {**request.offer.params, "request_type": "generation_only"}
        return msgspec.json.encode(fields)

    def early_params(self, request: Submit) -> dict[str, Any] | None:
        """None: the legs run one after the other."""
        return None

    def prefill_body(self, request: Submit, early_params: dict[str, Any] | None) -> bytes:
        already = len(request.token_ids) - request.prompt_token_count
        fields = self._fields(request, max(1, request.stop.max_tokens - already))
        request_id = xxhash.xxh3_64_intdigest(request.request_id.encode()) >> 2 | _LEAST_REQUEST_ID
        return msgspec.json.encode(
            fields | {"stream": False, "disaggregated_params": {"request_type": "context_only", "disagg_request_id": request_id}}
        )

    def _fields(self, request: Submit, max_tokens: int) -> dict[str, Any]:
        """Stop strings stay with us: they are found in the same text that the client sees, also across a migration. What was emitted
        elsewhere is a prompt here, so a sampled request goes on with another seed, else it would repeat its beginning's random numbers.
        """
        sampling, stop = request.sampling, request.stop
        already = len(request.token_ids) - request.prompt_token_count
        if request.cache_salt:
            raise InvalidRequest("TensorRT-LLM has no cache salts, so that its cache cannot be kept apart; send it without cache_salt")
        fields: dict[str, Any] = {
            "model": self._model,
            "prompt": request.token_ids,
            "detokenize": False,
            "add_special_tokens": False,
            "max_tokens": max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        wanted: dict[str, Any] = {
            "ignore_eos": stop.ignore_eos,
            "min_tokens": min(max(0, stop.min_tokens - already), max_tokens),
            "stop_token_ids": stop.stop_token_ids,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "logit_bias": {str(token_id): bias for token_id, bias in sampling.logit_bias.items()},
        }
        fields |= {name: value for name, value in wanted.items() if value}
        if sampling.repetition_penalty != 1.0:
            fields["repetition_penalty"] = sampling.repetition_penalty
        if sampling.temperature > 0:
            mixed = sampling.seed if not already else xxhash.xxh3_64_intdigest(f"{sampling.seed}:{already}".encode())
            fields["seed"] = mixed & ((1 << 63) - 1)
        if sampling.top_logprobs is not None:
            fields["logprobs"] = max(1, sampling.top_logprobs)
        if request.grammar is not None:
            if already:
                raise EngineFailed("TensorRT-LLM cannot go on in the middle of a grammar, with what was emitted elsewhere")
            fields["response_format"] = response_format(request.grammar)
        return fields

    def read(self, data: bytes) -> Chunk:
        answer = self._decode(data)
        if answer.object == "error" or (answer.message is not None and not answer.choices):
            return Chunk(error=EngineFailed(f"trtllm failed: {answer.message or 'no reason given'}"))
        usage = _usage_of(answer.usage)
        if not answer.choices:
            return Chunk(usage=usage)
        choice = answer.choices[0]
        if choice.token_ids is None and choice.finish_reason is None:
            raise WireError("this TensorRT-LLM does not tell token ids (detokenize: false); it is too old for Polyphase")
        token_ids = choice.token_ids or []
        return Chunk(token_ids, self._logprobs(token_ids, choice.logprobs), choice.finish_reason, choice.stop_reason, usage)

    def read_prefill(self, body: bytes) -> Chunk:
        """The decode leg tells the first token again, so none is told here.

        With another finish than these two the request is over after its first token, and there is nothing to hand over.
        """
        answer = self._decode(body)
        if not answer.choices:
            raise WireError("TensorRT-LLM answered a context-only request without a choice")
        choice, usage = answer.choices[0], _usage_of(answer.usage)
        params = {name: value for name, value in (choice.disaggregated_params or {}).items() if value is not None}
        if choice.finish_reason in ("length", "not_finished", None):
            if "ctx_request_id" not in params or "disagg_request_id" not in params:
                raise WireError("TensorRT-LLM computed the prompt without saying how to fetch it (ctx_request_id, disagg_request_id)")
            return Chunk(usage=usage, offer_params=params)
        token_ids = choice.token_ids or params.get("first_gen_tokens") or []
        return Chunk(token_ids, self._logprobs(token_ids, choice.logprobs), choice.finish_reason, choice.stop_reason, usage)

    def _decode(self, data: bytes) -> _Answer:
        try:
            return self._decoder.decode(data)
        except msgspec.DecodeError as error:
            raise WireError(f"TensorRT-LLM sent what is no piece of an answer ({error}): {data[:200]!r}") from error

    def _logprobs(self, token_ids: list[int], found: _Logprobs | None) -> list[TokenLogprob]:
        if found is None:
            return []
        tops = found.top_logprobs or [None] * len(token_ids)
        return [
            TokenLogprob(token_id, value if value is not None else float("-inf"), self._texts.ids_of(top or {}, token_id, value))
            for token_id, value, top in zip(token_ids, found.token_logprobs, tops, strict=False)
        ]


class TokenTexts:
    """From a token's text, as the server has it in its logprobs, back to the token's id; where several have one text, to none of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, int | None] | None = None

    def ids_of(self, top: dict[str, float], chosen: int, logprob: float | None) -> list[tuple[int, float]]:
        """Most probable first, the chosen token in any case. What cannot be told apart is left out."""
        if not top:
            return [] if logprob is None else [(chosen, logprob)]
        known = self._known()
        found = {token_id: value for text, value in top.items() if (token_id := known.get(text)) is not None}
        if logprob is not None:
            found[chosen] = logprob
        return sorted(found.items(), key=lambda pair: -pair[1])[: len(top)]

    def _known(self) -> dict[str, int | None]:
        if self._ids is None:  # once, when somebody asks for logprobs: a third of a second for 150,000 tokens
            self._ids = {}
            for token_id in range(self._tokenizer.vocab_size):
                text = self._tokenizer.decode([token_id], skip_special_tokens=False)
                self._ids[text] = None if text in self._ids else token_id
        return self._ids


def response_format(grammar: Grammar) -> dict[str, Any]:
    """In the words of its `ResponseFormat`. Raises: InvalidRequest."""
    match grammar.kind:
        case GrammarKind.JSON:
            return {"type": "json_object"}
        case GrammarKind.JSON_SCHEMA:
            return {"type": "json", "schema": json.loads(grammar.text)}
        case GrammarKind.REGEX:
            return {"type": "regex", "regex": grammar.text}
        case GrammarKind.EBNF:
            return {"type": "ebnf", "ebnf": grammar.text}
        case GrammarKind.CHOICE:
            choices = " | ".join(json.dumps(choice) for choice in json.loads(grammar.text))
            return {"type": "ebnf", "ebnf": f"root ::= {choices}"}


def _usage_of(usage: _Usage | None) -> Usage | None:
    if usage is None:
        return None
    return Usage(usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details is not None else None)
