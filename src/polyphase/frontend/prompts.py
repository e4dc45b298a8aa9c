"""From a request to the token ids of its prompts: chat template, tokenizer, and the check that they fit the model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from polyphase.core.errors import ContextLengthExceeded, InvalidRequest
from polyphase.core.hashing import sequence_hashes
from polyphase.core.ids import SequenceHash
from polyphase.frontend.chat import conversation_prompt
from polyphase.frontend.models import ServedModel
from polyphase.frontend.openai_types import ChatRequest, CompletionRequest
from polyphase.frontend.settings import FrontendSettings
from polyphase.frontend.validation import Wishes, token_ids
from polyphase.wire.requests import StopConditions

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, ready for a worker. `echo` is its text, if the client wants that back."""

    token_ids: list[int]
    hashes: list[SequenceHash]
    stop: StopConditions
    echo: str = ""


async def chat_prompts(request: ChatRequest, wishes: Wishes, model: ServedModel, settings: FrontendSettings) -> list[Prompt]:
    """Raises: InvalidRequest, ContextLengthExceeded, TemplateFailed."""
    template = model.template
    if template is None:
        raise InvalidRequest(model.chat_error or "the model has no chat template; use /v1/completions", param="model")

    def encode() -> list[int]:
        return _encoded_text(conversation_prompt(request, template), "messages", model, bool(request.add_special_tokens))

    size = sum(len(message.content) if isinstance(message.content, str) else _parts_size(message.content) for message in request.messages)
    ids = await _run(encode, size > settings.thread_above_chars)
    return [_prompt(ids, wishes, model, "messages")]


async def completion_prompts(request: CompletionRequest, wishes: Wishes, model: ServedModel, settings: FrontendSettings) -> list[Prompt]:
    """Raises: InvalidRequest, ContextLengthExceeded."""
    sources = _sources(request.prompt)
    if (count := len(sources) * wishes.choice_count) > settings.max_sequences:
        raise InvalidRequest(
            f"{len(sources)} prompts with {wishes.choice_count} choices each make {count} sequences; "
            f"at most {settings.max_sequences} are accepted in one request",
            param="prompt",
        )
    adds_special = request.add_special_tokens is not False

    def encode() -> list[tuple[list[int], str]]:
        return [_encoded(source, name, model, adds_special, wishes.echo) for source, name in sources]

    size = sum(len(source) for source, _ in sources if isinstance(source, str))
    return [
        _prompt(ids, wishes, model, name, text)
        for (ids, text), (_, name) in zip(await _run(encode, size > settings.thread_above_chars), sources, strict=True)
    ]


def _sources(prompt: str | list[str | int | list[int]]) -> list[tuple[str | list[int], str]]:
    """Each prompt with its name for error messages."""
    if isinstance(prompt, str):
        return [(prompt, "prompt")]
    if not prompt:
        raise InvalidRequest("prompt holds nothing", param="prompt")
    ids = [part for part in prompt if isinstance(part, int)]
    if len(ids) == len(prompt):
        return [(ids, "prompt")]
    sources = [(part, f"prompt[{index}]") for index, part in enumerate(prompt) if not isinstance(part, int)]
    if ids or len({type(source) for source, _ in sources}) > 1:
        raise InvalidRequest("prompt must be a string, a list of strings, a list of token ids or a list of such lists", param="prompt")
    return sources


def _encoded(source: str | list[int], name: str, model: ServedModel, adds_special: bool, echo: bool) -> tuple[list[int], str]:
    if isinstance(source, str):
        return _encoded_text(source, name, model, adds_special), source
    token_ids(name, source, model.card.vocab_size)
    return source, model.tokenizer.decode(source) if echo else ""


def _encoded_text(text: str, name: str, model: ServedModel, adds_special: bool) -> list[int]:
    """Raises: ContextLengthExceeded before any work is done, if the text is so long that it cannot fit."""
    least, context_length = model.tokenizer.least_token_count(text), model.card.context_length
    if least > context_length:
        raise ContextLengthExceeded(
            f"the prompt has {len(text)} characters, which are at least {least} tokens; "
            f"the model's context holds {context_length} for prompt and output together",
            param=name,
        )
    return model.tokenizer.encode(text, add_special_tokens=adds_special)


def _prompt(ids: list[int], wishes: Wishes, model: ServedModel, name: str, text: str = "") -> Prompt:
    if not ids:
        raise InvalidRequest(f"{name} is empty: the model needs at least one token to begin with", param=name)
    stop = wishes.stop_for(len(ids), model.card.context_length, name)
    hashes = sequence_hashes(ids, model.card.block_size, wishes.namespace)
    return Prompt(ids, hashes, stop, text if wishes.echo else "")


def _parts_size(content: object) -> int:
    return sum(len(part.text or "") for part in content) if isinstance(content, list) else 0


async def _run(work: Callable[[], T], is_long: bool) -> T:
    """In a thread if it would hold the loop for more than about 10 ms. A cancelled wait leaves the thread to finish by itself."""
    return await asyncio.to_thread(work) if is_long else work()
