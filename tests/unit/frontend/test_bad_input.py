"""Whatever a client may get wrong: a 4xx with OpenAI's error object and the field's name, and nothing started."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import pytest

from polyphase.frontend.settings import FrontendSettings

from .stack import Stack, raw_connection

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hi"}


def checked(answer: Any, status: int, param: str | None, code: str | None = None) -> str:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert error["message"]
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    if status < 500 and status != 429:
        assert error["type"] == "invalid_request_error"
    if code is not None:
        assert error["code"] == code
    return str(error["message"])


async def refused(stack: Stack, path: str, body: dict[str, Any], param: str | None, status: int = 400, code: str | None = None) -> str:
    message = checked(await stack.post(path, body), status, param, code)
    assert all(not worker.submits for worker in stack.workers.values())
    return message


CASES: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 10, "max_tokens": 5}, "min_tokens"),
    ({"min_tokens": 10**9}, "min_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"seed": 10**400}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"100000": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": "1"}}, "logit_bias"),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", 5]}, "stop[1]"),
    ({"stop_token_ids": [100000]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [3, -1]}, "stop_token_ids[1]"),
    ({"stop_token_ids": "x"}, "stop_token_ids"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"priority": 2**40}, "priority"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"nope": True}}, "stream_options.nope"),
    ({"stream": "yes"}, "stream"),
    ({"metadata": "x"}, "metadata"),
    ({"colour": 1}, "colour"),
    ({"temprature": 1}, "temprature"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"guided_json": {"type": "object"}}, "guided_json"),
    ({"logits_processors": ["x"]}, "logits_processors"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"model": 5}, "model"),
]


@pytest.mark.parametrize(("fields", "param"), CASES, ids=[f"{json.dumps(fields)[:60]}" for fields, _ in CASES])
async def test_fields_of_both_endpoints(stack: Stack, fields: dict[str, Any], param: str) -> None:
    await stack.add("worker-0")
    await refused(stack, CHAT, {"model": "tiny", "messages": [USER], **fields}, param)
    await refused(stack, TEXT, {"model": "tiny", "prompt": "hi", **fields}, param)


CHAT_CASES: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [USER, "hi"]}, "messages[1]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [USER, {"role": "user", "content": [{"type": "text"}]}]}, "messages[1].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "hi", "tool_call_id": "x"}]}, "messages[0].role"),
    ({"messages": [{**USER, "colour": 1}]}, "messages[0].colour"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"top_logprobs": 5}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 5}, "logprobs"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"chat_template": "{{ messages }}"}, "chat_template"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"prompt": "hi"}, "prompt"),
    ({"echo": True}, "echo"),
]


@pytest.mark.parametrize(("fields", "param"), CHAT_CASES, ids=[json.dumps(fields)[:70] for fields, _ in CHAT_CASES])
async def test_chat_fields(stack: Stack, fields: dict[str, Any], param: str) -> None:
    await stack.add("worker-0")
    await refused(stack, CHAT, {"model": "tiny", "messages": [USER], **fields}, param)


TEXT_CASES: list[tuple[dict[str, Any], str]] = [
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"text": "x"}}, "prompt"),
    ({"prompt": ["x", 5]}, "prompt"),
    ({"prompt": ["x", [5]]}, "prompt"),
    ({"prompt": [5, [6]]}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": [5, True]}, "prompt[1]"),
    ({"prompt": [5, 1.5]}, "prompt[1]"),
    ({"prompt": [5, 100000]}, "prompt[1]"),
    ({"prompt": [[5], [-1]]}, "prompt[1][0]"),
    ({"prompt": [10**50]}, "prompt[0]"),
    ({"prompt": ["x"] * 129}, "prompt"),
    ({"prompt": ["x"] * 20, "n": 16}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": True, "logprobs": 1}, "echo"),
    ({"messages": [USER]}, "messages"),
]


@pytest.mark.parametrize(("fields", "param"), TEXT_CASES, ids=[json.dumps(fields)[:70] for fields, _ in TEXT_CASES])
async def test_completion_fields(stack: Stack, fields: dict[str, Any], param: str) -> None:
    await stack.add("worker-0")
    await refused(stack, TEXT, {"model": "tiny", "prompt": "hi", **fields}, param)


BROKEN = [
    b"",
    b"{",
    b"[]",
    b'"text"',
    b"null",
    b'{"model": "tiny", "prompt": "x",}',
    b'{"model": "tiny", "prompt": "\xff"}',
    b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
    b'{"model": "tiny", "prompt": "x", "temperature": Infinity}',
    b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
    b'{"model": "tiny", "prompt": "x"} trailing',
    b"\x00\x01\x02",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"model": "tiny", "prompt": "x", "metadata": ' + b'{"a":' * 50_000,
]


@pytest.mark.parametrize("body", BROKEN, ids=[repr(body[:40]) for body in BROKEN])
async def test_broken_json(stack: Stack, body: bytes) -> None:
    await stack.add("worker-0")
    answer = await stack.post(TEXT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    checked(answer, 400, answer.json()["error"]["param"])


async def test_messages_say_what_would_be_right(stack: Stack) -> None:
    await stack.add("worker-0")
    chat = {"model": "tiny", "messages": [USER]}
    assert "did you mean 'temperature'" in await refused(stack, CHAT, {**chat, "temprature": 1}, "temprature")
    assert "not supported yet" in await refused(stack, CHAT, {**chat, "tools": [{}]}, "tools")
    assert await refused(stack, CHAT, {**chat, "max_tokens": "x"}, "max_tokens") == "max_tokens must be an integer or null, not a string"
    assert "between 0 and 2" in await refused(stack, CHAT, {**chat, "temperature": 9}, "temperature")
    message = await refused(stack, TEXT, {"model": "tiny", "prompt": [5] * 600}, "prompt", code="context_length_exceeded")
    assert "600" in message
    assert "512" in message
    message = await refused(
        stack, TEXT, {"model": "tiny", "prompt": [5] * 500, "max_tokens": 20}, "max_tokens", code="context_length_exceeded"
    )
    assert "at most 12" in message
    await refused(stack, CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "x " * 2000}]}, "messages")
    assert "required" in await refused(stack, CHAT, {"messages": [USER]}, "model")
    assert "tiny" in await refused(stack, CHAT, {**chat, "model": "other"}, "model", 404, "model_not_found")


async def test_unsupported_fields_that_ask_for_nothing_are_accepted(stack: Stack) -> None:
    await stack.add("worker-0")
    neutral = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"], "functions": None,
        "parallel_tool_calls": True, "user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "logprobs": False,
        "best_of": 1, "guided_json": None, "logit_bias": None, "stop": None, "seed": None, "stream_options": None, "max_tokens": 3,
    }  # fmt: skip
    answer = await stack.post(CHAT, {"model": "tiny", "messages": [USER], **neutral})
    assert answer.status_code == 200, answer.text
    again = answer.json()["choices"][0]["message"] | {"tool_calls": None, "audio": None, "function_call": None, "annotations": []}
    followed = await stack.post(CHAT, {"model": "tiny", "messages": [USER, again, USER], "max_tokens": 3})
    assert followed.status_code == 200, followed.text
    for wrong in (True, 1.0):
        assert (await stack.post(TEXT, {"model": "tiny", "prompt": "x", "best_of": wrong})).status_code == 400


async def test_paths_and_methods(stack: Stack) -> None:
    checked(await stack.post("/v1/nothing", {}), 404, None, "not_found")
    checked(await stack.get("/"), 404, None, "not_found")
    checked(await stack.post("/v1/completions/", {}), 404, None, "not_found")
    answer = await stack.get(CHAT)
    checked(answer, 405, None, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    answer = await stack.post("/v1/models", {})
    checked(answer, 405, None, "method_not_allowed")
    assert answer.headers["allow"] == "GET, HEAD"
    checked(await stack.get("/debug/requests/none"), 404, None, "not_found")
    checked(await stack.get("/v1/models/none"), 404, "model", "model_not_found")


@pytest.mark.parametrize("kind", ["text/plain", "", "multipart/form-data", "application/jsonx"])
async def test_content_type(stack: Stack, kind: str) -> None:
    checked(await stack.post(CHAT, content=b"{}", headers={"content-type": kind}), 415, None, "unsupported_media_type")


async def test_content_type_with_a_charset_is_fine(stack: Stack) -> None:
    answer = await stack.post(CHAT, content=b"{}", headers={"content-type": "application/json; charset=utf-8"})
    checked(answer, 400, "model")


@pytest.mark.parametrize("settings", [FrontendSettings(max_body_bytes=1000)])
async def test_an_oversized_body(stack: Stack) -> None:
    message = checked(await stack.post(CHAT, {"model": "x" * 2000}), 413, None, "body_too_large")
    assert "1,000" in message

    async def endless() -> Any:
        for _ in range(100):
            yield b"x" * 500

    chunked = await stack.post(CHAT, content=endless(), headers={"content-type": "application/json"})
    checked(chunked, 413, None, "body_too_large")


@pytest.mark.parametrize("settings", [FrontendSettings(max_body_bytes=1000)])
async def test_an_oversized_body_is_refused_before_it_is_read(stack: Stack) -> None:
    """The client says how much will come, and sends nothing of it."""
    with raw_connection(stack.url) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99999999999\r\n\r\n"
        connection.sendall(head.encode())
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        answer = await asyncio.wait_for(loop.sock_recv(connection, 65536), 20)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize("settings", [FrontendSettings(body_timeout_s=0.1)])
async def test_a_body_that_does_not_come(stack: Stack) -> None:
    with raw_connection(stack.url) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n"
        connection.sendall(head.encode() + b"{")
        connection.setblocking(False)
        answer = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(connection, 65536), 20)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"did not arrive" in answer


async def test_a_text_that_cannot_fit_is_not_even_tokenised(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    await stack.add("worker-0")

    def broken(*args: Any, **options: Any) -> Any:
        raise AssertionError("tokenised")

    monkeypatch.setattr("polyphase.text.Tokenizer.encode", broken)
    message = await refused(stack, TEXT, {"model": "tiny", "prompt": "x" * 100_000}, "prompt", code="context_length_exceeded")
    assert "100000 characters" in message
    assert "512" in message
    await refused(stack, CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "x" * 100_000}]}, "messages")


async def test_request_ids(stack: Stack) -> None:
    await stack.add("worker-0")
    body = {"model": "tiny", "prompt": "x", "max_tokens": 2}
    given = await stack.post(TEXT, body, headers={"x-request-id": "my-id.1"})
    assert given.headers["x-request-id"] == "my-id.1"
    assert (await stack.record("my-id.1"))["id"] == "my-id.1"
    assert (await stack.record(given.json()["id"]))["id"] == "my-id.1"
    for unusable in ("", "a b", "x" * 200, "ä"):
        answer = await stack.post(TEXT, body, headers=[("x-request-id", unusable.encode())])
        assert answer.headers["x-request-id"].startswith("req-")
    made = await stack.post(TEXT, body)
    assert (await stack.record(made.headers["x-request-id"]))["answer_id"] == made.json()["id"]
    assert made.json()["id"].startswith("cmpl-")


async def test_the_same_request_id_twice_at_once(stack: Stack) -> None:
    worker = await stack.add("worker-0")
    worker.behaviour.step_s = 0.005
    body = {"model": "tiny", "prompt": "x", "max_tokens": 10}
    answers = await asyncio.gather(*[stack.post(TEXT, body, headers={"x-request-id": "same"}) for _ in range(3)])
    assert [answer.status_code for answer in answers] == [200] * 3
    assert len({submit.request_id for submit in worker.submits}) == 3


async def test_an_internal_error_tells_nothing(stack: Stack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    await stack.add("worker-0")

    def broken(*args: Any, **options: Any) -> Any:
        raise ValueError("secret detail")

    monkeypatch.setattr(stack.services.dispatcher, "start", broken)
    answer = await stack.post(TEXT, {"model": "tiny", "prompt": "x"})
    message = checked(answer, 500, None, "internal_error")
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in message
    assert "secret detail" in caplog.text


async def test_a_model_without_a_chat_template(stack: Stack) -> None:
    import msgspec

    await stack.add("worker-0", card=msgspec.structs.replace(stack.card, chat_template=None))
    assert "no chat template" in await refused(stack, CHAT, {"model": "tiny", "messages": [USER]}, "model")
    assert (await stack.post(TEXT, {"model": "tiny", "prompt": "x"})).status_code == 200


async def test_a_broken_chat_template_is_not_the_callers_fault(stack: Stack) -> None:
    import msgspec

    await stack.add("worker-0", card=msgspec.structs.replace(stack.card, chat_template="{{ messages[0].missing.deeper }}"))
    checked(await stack.post(CHAT, {"model": "tiny", "messages": [USER]}), 500, None, "chat_template_failed")


async def test_a_compressed_body_is_refused_as_such(stack: Stack) -> None:
    await stack.add("worker-0")
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = await stack.post(CHAT, content=gzip.compress(b"{}"), headers=headers)
    assert "gzip" in checked(answer, 415, None, "unsupported_media_type")


@pytest.mark.parametrize("data", [b"GARBAGE\r\n\r\n", b"POST /v1/models HTTP/1.1\r\ncontent-length: x\r\n\r\n"])
async def test_what_is_not_http_is_answered_with_an_error_object_too(stack: Stack, data: bytes) -> None:
    with raw_connection(stack.url) as connection:
        connection.sendall(data)
        answer = await asyncio.to_thread(lambda: b"".join(iter(lambda: connection.recv(4096), b"")))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "invalid_value"
