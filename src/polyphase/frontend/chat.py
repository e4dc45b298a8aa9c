"""Chat templates: a model's Jinja2 source and a conversation make a prompt.

The template comes with the model and is not trusted: it runs in Jinja2's immutable sandbox. Its environment is the one that templates
are written for. Source: transformers' chat templating (names, filters, whitespace rules).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from polyphase.core.errors import InvalidRequest, PolyphaseError
from polyphase.frontend.openai_types import ChatMessage, ChatRequest
from polyphase.wire.cards import ModelCard

ROLES = ("system", "developer", "user", "assistant")
RESERVED_NAMES = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token"})
MAX_PROMPT_CHARS = 100_000_000  # a template with a loop must not fill the memory


class TemplateFailed(PolyphaseError):
    """The model's template is broken: the caller cannot help it."""

    code = "chat_template_failed"
    stage = "templating"


class _Refusal(Exception):
    """`raise_exception('…')` in a template: this conversation does not suit the model."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks assistant text for training; here it is the text alone."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own form

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> NoReturn:
    raise _Refusal(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """As transformers does it: without the HTML escapes of Jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """Raises: TemplateFailed if the source does not compile."""

    def __init__(self, source: str, *, bos_token: str | None, eos_token: str | None) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateFailed(f"the model's chat template does not compile: {error}") from error
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}

    @classmethod
    def of(cls, card: ModelCard) -> ChatTemplate | None:
        if card.chat_template is None:
            return None
        return cls(card.chat_template, bos_token=card.bos_token, eos_token=card.eos_token)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, extra: Mapping[str, Any] | None = None) -> str:
        """Raises: InvalidRequest if the template refuses the conversation; TemplateFailed if it breaks down."""
        names = {**(extra or {}), **self._tokens, "messages": messages, "tools": None, "add_generation_prompt": add_generation_prompt}
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate(names):
                length += len(part)
                if length > MAX_PROMPT_CHARS:
                    raise InvalidRequest(f"the conversation makes a prompt of more than {MAX_PROMPT_CHARS:,} characters", param="messages")
                parts.append(part)
        except _Refusal as refusal:
            raise InvalidRequest(f"the model's chat template refuses this conversation: {refusal}", param="messages") from refusal
        except InvalidRequest:
            raise
        except Exception as error:  # a template may raise anything, as any program may
            raise TemplateFailed(f"the model's chat template failed on this conversation: {type(error).__name__}: {error}") from error
        return "".join(parts)


def conversation_prompt(request: ChatRequest, template: ChatTemplate) -> str:
    """The prompt of a chat request.

    Raises: InvalidRequest, TemplateFailed.
    """
    messages = [_as_template_message(message, f"messages[{index}]") for index, message in enumerate(request.messages)]
    if not messages:
        raise InvalidRequest("messages must hold at least one message", param="messages")
    continues = bool(request.continue_final_message)
    if continues and request.add_generation_prompt:
        raise InvalidRequest("continue_final_message and add_generation_prompt exclude each other", param="continue_final_message")
    extra = dict(request.chat_template_kwargs or {})
    if taken := sorted(RESERVED_NAMES & extra.keys()):
        raise InvalidRequest(f"chat_template_kwargs cannot set {', '.join(taken)}", param="chat_template_kwargs")
    if request.reasoning_effort is not None:
        extra.setdefault("reasoning_effort", request.reasoning_effort)
    begins_answer = not continues if request.add_generation_prompt is None else request.add_generation_prompt
    rendered = template.render(messages, add_generation_prompt=begins_answer, extra=extra)
    return _cut_after(rendered, messages[-1]["content"]) if continues else rendered


def _as_template_message(message: ChatMessage, path: str) -> dict[str, Any]:
    if message.role not in ROLES:
        known = "tool calls are not supported yet" if message.role in ("tool", "function") else f"use one of {', '.join(ROLES)}"
        raise InvalidRequest(f"{path}.role is {message.role[:50]!r}: {known}", param=f"{path}.role")
    for name in ("tool_calls", "function_call", "audio", "tool_call_id"):
        if getattr(message, name):
            raise InvalidRequest(f"{path}.{name} is not supported yet; leave it out", param=f"{path}.{name}")
    content = _text_of(message, path)
    # Few templates know OpenAI's newer name of the system role.
    fields: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content}
    if message.name is not None:
        fields["name"] = message.name
    reasoning = message.reasoning_content if message.reasoning_content is not None else message.reasoning
    if reasoning is not None:
        fields["reasoning_content"] = reasoning
    return fields


def _text_of(message: ChatMessage, path: str) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    if content is None:
        if message.role == "assistant" and message.refusal is not None:
            return message.refusal
        raise InvalidRequest(f"{path}.content is required and must be a string or a list of text parts", param=f"{path}.content")
    if not content:
        raise InvalidRequest(f"{path}.content holds no parts", param=f"{path}.content")
    texts = []
    for index, part in enumerate(content):
        where = f"{path}.content[{index}]"
        if part.type != "text":
            raise InvalidRequest(f"{where} is of type {part.type[:50]!r}; only 'text' is supported yet", param=f"{where}.type")
        if part.text is None:
            raise InvalidRequest(f"{where}.text is required and must be a string", param=f"{where}.text")
        texts.append(part.text)
    return "\n".join(texts)


def _cut_after(rendered: str, content: str) -> str:
    """The prompt up to the end of the last message's text, so that the model goes on writing it.

    Templates may strip a message, so its trailing space counts only if it is there.
    Raises: InvalidRequest if the template shows the text in another form.
    """
    for wanted in (content, content.strip()):
        at = rendered.rfind(wanted)
        if wanted and at >= 0:
            return rendered[: at + len(wanted)]
    raise InvalidRequest(
        "continue_final_message needs a last message whose text appears unchanged in the prompt", param="continue_final_message"
    )
