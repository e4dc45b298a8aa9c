"""Ranges and combinations: from a parsed request to the sampling parameters and stop conditions that a worker gets.

A value that cannot be meant is refused with the field's name and the range that would be right; nothing is clamped silently.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

from polyphase.core.errors import ContextLengthExceeded, InvalidRequest
from polyphase.core.hashing import namespace_of
from polyphase.frontend.grammars import GrammarWish, grammar_wish
from polyphase.frontend.models import ServedModel
from polyphase.frontend.openai_types import ChatRequest, CompletionRequest, GenerationRequest
from polyphase.wire.requests import SamplingParams, StopConditions

MAX_CHOICES = 16
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1000
MAX_TOP_LOGPROBS = 20
MAX_SALT_CHARS = 1024
DEFAULT_COMPLETION_TOKENS = 16  # Source: OpenAI's completions endpoint
_SEED_MASK = 2**63 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # spreads the seeds of a request's choices


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a request wants, checked; the same for each of its prompts and choices but for the seed and the room for output."""

    choice_count: int
    sampling: SamplingParams
    stop: StopConditions  # its max_tokens counts only after `stop_for`
    max_tokens: int | None  # as the client said it
    max_tokens_name: str
    default_max_tokens: int | None  # None: the rest of the context
    wants_logprobs: bool
    include_stop: bool
    skip_special_tokens: bool
    return_token_ids: bool
    echo: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    cache_salt: str | None
    priority: int
    grammar: GrammarWish | None
    lora: str | None = None  # the adapter that the request's model stands for

    @property
    def namespace(self) -> str | None:
        """What makes equal tokens differ in every hash of them."""
        return namespace_of(self.cache_salt, self.lora)

    def sampling_for(self, position: int) -> SamplingParams:
        """The first sequence has the client's seed, the others seeds derived from it."""
        if position == 0:
            return self.sampling
        seed = (self.sampling.seed + position * _GOLDEN) & _SEED_MASK
        fields = {name: getattr(self.sampling, name) for name in self.sampling.__struct_fields__}
        return SamplingParams(**{**fields, "seed": seed})

    def stop_for(self, prompt_token_count: int, context_length: int, prompt_name: str) -> StopConditions:
        """Raises: ContextLengthExceeded if prompt and output do not fit."""
        room = context_length - prompt_token_count
        if room < 1:
            raise ContextLengthExceeded(
                f"the prompt has {prompt_token_count} tokens; the model's context holds {context_length} for prompt and output together",
                param=prompt_name,
            )
        if self.max_tokens is not None and self.max_tokens > room:
            raise ContextLengthExceeded(
                f"the prompt has {prompt_token_count} tokens and {self.max_tokens} of output are asked for; "
                f"the model's context holds {context_length} together, so {self.max_tokens_name} can be at most {room}",
                param=self.max_tokens_name,
            )
        wanted = self.max_tokens or (room if self.default_max_tokens is None else min(room, self.default_max_tokens))
        stop = self.stop
        if stop.min_tokens > wanted:
            raise InvalidRequest(f"min_tokens is {stop.min_tokens}, more than the {wanted} tokens that fit", param="min_tokens")
        return StopConditions(
            max_tokens=wanted,
            min_tokens=stop.min_tokens,
            ignore_eos=stop.ignore_eos,
            stop_token_ids=stop.stop_token_ids,
            stop_strings=stop.stop_strings,
        )


def chat_wishes(request: ChatRequest, model: ServedModel) -> Wishes:
    """Raises: InvalidRequest."""
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(f"max_tokens is {old} and max_completion_tokens {new}; give one of them", param="max_completion_tokens")
    top = integer("top_logprobs", request.top_logprobs, 0, MAX_TOP_LOGPROBS)
    if top is not None and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    name = "max_tokens" if new is None else "max_completion_tokens"
    return _wishes(request, model, (name, old if new is None else new, None), (top or 0) if request.logprobs else None)


def completion_wishes(request: CompletionRequest, model: ServedModel) -> Wishes:
    """Raises: InvalidRequest."""
    top = integer("logprobs", request.logprobs, 0, MAX_TOP_LOGPROBS)
    if request.echo and top is not None:
        raise InvalidRequest("echo together with logprobs is not supported yet: prompt tokens get no log-probabilities", param="echo")
    limit = ("max_tokens", request.max_tokens, DEFAULT_COMPLETION_TOKENS)
    return _wishes(request, model, limit, top, echo=bool(request.echo))


def _wishes(
    request: GenerationRequest,
    model: ServedModel,
    limit: tuple[str, int | None, int | None],
    top_logprobs: int | None,
    *,
    echo: bool = False,
) -> Wishes:
    name, max_tokens, default_max_tokens = limit
    integer(name, max_tokens, 1, None)
    min_tokens = integer("min_tokens", request.min_tokens, 0, None) or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens is {min_tokens}, more than {name}, which is {max_tokens}", param="min_tokens")
    options = request.stream_options
    if options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
    stop = StopConditions(
        max_tokens=max_tokens or 1,
        min_tokens=min_tokens,
        ignore_eos=bool(request.ignore_eos),
        stop_token_ids=token_ids("stop_token_ids", request.stop_token_ids or [], model.card.vocab_size),
        stop_strings=_stop_strings(request.stop),
    )
    return Wishes(
        choice_count=integer("n", request.n, 1, MAX_CHOICES) or 1,
        sampling=_sampling(request, model, top_logprobs),
        stop=stop,
        max_tokens=max_tokens,
        max_tokens_name=name,
        default_max_tokens=default_max_tokens,
        wants_logprobs=top_logprobs is not None,
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        return_token_ids=bool(request.return_token_ids),
        echo=echo,
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
        cache_salt=_cache_salt(request.cache_salt),
        priority=integer("priority", request.priority, -(2**31), 2**31 - 1) or 0,
        grammar=grammar_wish(request),
    )


def _sampling(request: GenerationRequest, model: ServedModel, top_logprobs: int | None) -> SamplingParams:
    """Where the client says nothing, the model's own generation config does; where that is silent, OpenAI's defaults."""
    card = model.card
    temperature = number("temperature", request.temperature, 0, 2)
    top_p = number("top_p", request.top_p, 0, 1, is_open_below=True)
    top_k = integer("top_k", request.top_k, -1, None)
    seed = integer("seed", request.seed, -(2**63), 2**63 - 1)
    return SamplingParams(
        seed=secrets.randbits(63) if seed is None else seed & _SEED_MASK,
        temperature=_first(temperature, card.default_temperature, 1.0),
        top_p=_first(top_p, card.default_top_p, 1.0),
        top_k=min(max(top_k if top_k is not None else card.default_top_k or 0, 0), card.vocab_size),
        min_p=number("min_p", request.min_p, 0, 1) or 0.0,
        presence_penalty=number("presence_penalty", request.presence_penalty, -2, 2) or 0.0,
        frequency_penalty=number("frequency_penalty", request.frequency_penalty, -2, 2) or 0.0,
        repetition_penalty=_first(number("repetition_penalty", request.repetition_penalty, 0, 100, is_open_below=True), 1.0),
        logit_bias=_logit_bias(request.logit_bias, card.vocab_size),
        top_logprobs=top_logprobs,
    )


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def integer(name: str, value: int | None, low: int | None, high: int | None) -> int | None:
    """The value if it is within its range, ends included. Raises: InvalidRequest."""
    if value is None or ((low is None or value >= low) and (high is None or value <= high)):
        return value
    if high is None:
        raise InvalidRequest(f"{name} must be at least {low}, not {_shown(value)}", param=name)
    raise InvalidRequest(f"{name} must be between {low} and {high}, not {_shown(value)}", param=name)


def number(name: str, value: float | None, low: float, high: float, *, is_open_below: bool = False) -> float | None:
    """The value if it is finite and within its range. Raises: InvalidRequest."""
    if value is None or (math.isfinite(value) and low <= value <= high and not (is_open_below and value == low)):
        return value
    span = f"above {low:g} and at most {high:g}" if is_open_below else f"between {low:g} and {high:g}"
    raise InvalidRequest(f"{name} must be {span}, not {value:g}", param=name)


def token_ids(name: str, ids: list[int], vocab_size: int) -> list[int]:
    """The ids if the model knows them all. Raises: InvalidRequest with the position of the first that it does not."""
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        at, wrong = next((at, i) for at, i in enumerate(ids) if not 0 <= i < vocab_size)
        raise InvalidRequest(f"{name}[{at}] is {_shown(wrong)}; the model's token ids go from 0 to {vocab_size - 1}", param=f"{name}[{at}]")
    return ids


def _stop_strings(stop: str | list[str] | None) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop holds {len(stops)} strings; at most {MAX_STOP_STRINGS} are accepted", param="stop")
    for text in stops:
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise InvalidRequest(f"a stop string must have 1 to {MAX_STOP_CHARS} characters, not {len(text)}", param="stop")
    return stops


def _logit_bias(bias: dict[str, float] | None, vocab_size: int) -> dict[int, float]:
    checked: dict[int, float] = {}
    for key, value in (bias or {}).items():
        if not (key.isascii() and key.isdecimal() and len(key) < 12 and int(key) < vocab_size):
            raise InvalidRequest(f"logit_bias: {key[:50]!r} is no token id between 0 and {vocab_size - 1}", param="logit_bias")
        if not -100 <= value <= 100:
            raise InvalidRequest(f"logit_bias: the bias of token {key} must be between -100 and 100, not {value:g}", param="logit_bias")
        checked[int(key)] = value
    return checked


def _cache_salt(salt: str | None) -> str | None:
    if salt is not None and not 1 <= len(salt) <= MAX_SALT_CHARS:
        raise InvalidRequest(f"cache_salt must have 1 to {MAX_SALT_CHARS} characters, not {len(salt)}", param="cache_salt")
    if salt is not None and salt.startswith("\0"):  # Source: core.hashing.namespace_of
        raise InvalidRequest("cache_salt must not begin with the character NUL", param="cache_salt")
    return salt


def _shown(value: int) -> str:
    """A number for an error message; one of a thousand digits is cut, and never converted (Python refuses beyond 4,300 digits)."""
    return str(value) if abs(value) < 10**20 else f"a number of about 10^{int(value.bit_length() * 0.30103)}"
