"""What of a request is told to the router when its body is passed through: kinds, size, blocks of text, headers."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from polyphase.frontend.forms import asked_in_form
from polyphase.frontend.passing import (
    TOKENS_PER_MEDIUM,
    Passing,
    asked_in_json,
    carried_headers,
    may_hold_media,
    media_in,
    passing_of,
    text_hashes,
)

BLOCK = 16


def passed(kind: str, fields: dict[str, Any], block_size: int | None = BLOCK) -> Passing:
    body = json.dumps({"model": "m", **fields}).encode()
    return passing_of(kind, asked_in_json(body), body, "application/json", [], block_size)


def chat(*contents: Any, **fields: Any) -> Passing:
    roles = ("user", "assistant")
    return passed("chat", {"messages": [{"role": roles[at % 2], "content": content} for at, content in enumerate(contents)], **fields})


@given(st.binary(max_size=600), st.binary(max_size=600))
def test_a_longer_text_has_the_hashes_of_its_beginning(first: bytes, more: bytes) -> None:
    short, long = text_hashes(first, BLOCK, None), text_hashes(first + more, BLOCK, None)
    assert len(short) == len(first) // (4 * BLOCK)
    assert long[: len(short)] == short
    if short:
        assert text_hashes(first, BLOCK, "tenant") != short


def test_a_conversation_that_goes_on_keeps_its_blocks() -> None:
    first = chat("a" * 500)
    second = chat("a" * 500, "b" * 300, "c" * 300)
    assert 6 <= len(first.hashes) <= len(second.hashes)
    assert second.hashes[: len(first.hashes) - 1] == first.hashes[:-1]
    assert chat("x" * 500).hashes[-1] != first.hashes[-1]
    assert chat("a" * 500, tools=[{"type": "function"}]).hashes[0] != first.hashes[0]


def test_an_image_is_a_name_in_the_prompt() -> None:
    def picture(data: str) -> Any:
        return [{"type": "text", "text": "t" * 400}, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}]

    large, same, other = (chat(picture(data), "u" * 400) for data in ("A" * 1_000_000, "A" * 1_000_000, "B" * 1_000_000))
    assert large.hashes == same.hashes != other.hashes
    assert large.prompt_token_count < TOKENS_PER_MEDIUM + 400
    assert large.kinds == ["chat", "images"]
    assert large.shown_kinds == "images"


def test_media_are_found_where_they_are() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_audio"}, {"type": "video_url"}, {"type": "image_url"}, {"type": "image_url"}]
    found = media_in({"messages": [{"role": "user", "content": "text"}, {"role": "user", "content": parts}, None, {"content": [1]}]})
    assert found == {"audio": "messages[1].content[1]", "video": "messages[1].content[2]", "images": "messages[1].content[3]"}
    assert media_in({"messages": 3}) == {}
    assert not may_hold_media(json.dumps({"text": '"image_url"'}).encode()), "in a string, quotes are escaped"


def test_sizes() -> None:
    assert passed("completions", {"prompt": "a" * 400}).prompt_token_count == 100
    assert passed("completions", {"prompt": "a", "max_tokens": 7}).max_output_tokens == 7
    assert chat("a", max_completion_tokens=9, max_tokens=3).max_output_tokens == 9
    for odd in (-1, "many", True, 10**30, None):
        assert passed("completions", {"prompt": "a", "max_tokens": odd}).max_output_tokens >= 1
    embedding = passed("embeddings", {"input": ["a" * 4000]})
    assert (embedding.hashes, embedding.max_output_tokens) == ([], 1)
    assert embedding.prompt_token_count >= 1000
    assert passed("chat", {"messages": [{"role": "user", "content": "a" * 400}]}, None).hashes == [], "workers of tokens hold no text"


def test_headers() -> None:
    given_headers = {
        "Accept": "a", "traceparent": "t", "x-tag": "1", "host": "h", "connection": "keep-alive", "content-length": "3",
        "authorization": "s", "x-api-key": "s", "x-goog-api-key": "s", "x-amz-security-token": "s", "cookie": "s", "x-csrf-token": "s",
        "x-real-ip": "s", "x-forwarded-host": "s", "x-polyphase-session": "s", "openai-project": "s", "x-stainless-os": "s",
        "x-request-id": "s", "x-my-secret": "s", "transfer-encoding": "chunked", "upgrade": "u", "te": "t", "proxy-authorization": "s",
    }  # fmt: skip
    raw = [(name.lower().encode(), value.encode()) for name, value in given_headers.items()]
    assert carried_headers(raw) == [("accept", "a"), ("traceparent", "t"), ("x-tag", "1")]
    assert len(carried_headers([(f"x-{at}".encode(), b"v") for at in range(1000)])) <= 32
    assert carried_headers([(b"x-long", b"v" * 10_000)]) == []


@given(st.binary(max_size=300), st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=20))
def test_forms(sound: bytes, model: str) -> None:
    boundary = b"----boundary0123456789abcdefghijklmnop"
    parts = [
        b'Content-Disposition: form-data; name="file"; filename="model.wav"\r\nContent-Type: audio/wav\r\n\r\n' + sound,
        b'Content-Disposition: form-data; name="model"\r\n\r\n' + model.encode(),
        b"content-disposition: form-data; name=stream\r\n\r\ntrue",
    ]
    body = b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"
    asked = asked_in_form(body, f'multipart/form-data; boundary="{boundary.decode()}"')
    assert (asked.model, asked.wants_stream) == (model, True)
    assert asked.model_span is not None
    assert body[slice(*asked.model_span)] == model.encode()
