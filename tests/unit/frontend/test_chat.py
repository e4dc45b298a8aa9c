"""Chat templates: what they may use, what they may not, and which prompt a conversation makes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from polyphase.core.errors import InvalidRequest
from polyphase.frontend.chat import ChatTemplate, TemplateFailed, conversation_prompt
from polyphase.frontend.openai_types import ChatRequest

from .conftest import TEMPLATE


def template(source: str = TEMPLATE) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>")


def prompt(source: str = TEMPLATE, **fields: Any) -> str:
    request = msgspec.convert({"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}, ChatRequest)
    return conversation_prompt(request, template(source))


def test_a_conversation() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": {}}]},
        {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "user", "content": ""},
    ]
    assert prompt(messages=messages) == "<|system|>be brief<|end|><|user|>a\nb<|end|><|assistant|>no<|end|><|user|><|end|><|assistant|>"


def test_the_answer_may_not_be_begun() -> None:
    assert prompt(add_generation_prompt=False) == "<|user|>hi<|end|>"


@pytest.mark.parametrize(("last", "end"), [("Once upon", "Once upon"), ("Once upon ", "Once upon ")])
def test_the_final_message_can_be_continued(last: str, end: str) -> None:
    messages = [{"role": "user", "content": "Once upon"}, {"role": "assistant", "content": last}]
    assert prompt(messages=messages, continue_final_message=True) == f"<|user|>Once upon<|end|><|assistant|>{end}"


def test_a_final_message_that_the_template_changes_cannot_be_continued() -> None:
    with pytest.raises(InvalidRequest, match="unchanged"):
        prompt("{{ messages[0].content | upper }}", continue_final_message=True)


def test_whitespace_rules_and_helpers_that_templates_are_written_for() -> None:
    source = (
        "{%- for m in messages %}\n"
        "    {%- if loop.index0 > 5 %}{% break %}{% endif %}\n"
        "    {{- bos_token ~ ({'b': 'é<', 'a': [1]} | tojson) }}\n"
        "    {% generation %}{{ m.content }}{% endgeneration %}\n"
        "{%- endfor %}{{ strftime_now('%Y') | length }}{{ enable_thinking }}"
    )
    assert prompt(source, chat_template_kwargs={"enable_thinking": False}) == '<s>{"b": "é<", "a": [1]}\nhi4False'


def test_reasoning_is_handed_on() -> None:
    source = "{{ reasoning_effort }}:{{ messages[0].reasoning_content }}"
    messages = [{"role": "assistant", "content": "x", "reasoning": "because"}]
    assert prompt(source, messages=messages, reasoning_effort="low") == "low:because"


def test_a_template_can_refuse() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        prompt("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages[0].nothing.further }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ],
)
def test_a_template_cannot_break_out(source: str) -> None:
    with pytest.raises(TemplateFailed):
        prompt(source)


def test_a_template_cannot_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyphase.frontend.chat.MAX_PROMPT_CHARS", 1000)
    with pytest.raises(InvalidRequest, match="more than 1,000 characters"):
        prompt("{% for i in range(99999) %}xxxx{% endfor %}")


def test_a_template_that_does_not_compile() -> None:
    with pytest.raises(TemplateFailed, match="does not compile"):
        template("{% if %}")
