"""Structured output over real HTTP, with the official client, the shipped model, and workers that die."""

from __future__ import annotations

import json
import os
import re
import signal
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field

from polyphase.testing import Deployment
from tests.e2e.conftest import completed_ids, prompt_of
from tests.e2e.test_faults import wait_until_complete

MESSAGES: list[Any] = [{"role": "user", "content": "Which book?"}]
LONG = "[a-d]{40}(-[0-9]{20}){3}"


class Book(BaseModel):
    model_config = ConfigDict(extra="forbid")

    title: str = Field(max_length=12)
    year: int = Field(ge=1000, le=2030)
    kind: Literal["novel", "essay"]
    tags: list[Literal["old", "new"]] = Field(max_length=2)


def schema_format() -> Any:
    return {"type": "json_schema", "json_schema": {"name": "book", "strict": True, "schema": Book.model_json_schema()}}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_pydantic_model_comes_back(client: OpenAI, temperature: float) -> None:
    answer = client.chat.completions.parse(
        model="demo", messages=MESSAGES, response_format=Book, max_tokens=400, temperature=temperature, seed=5
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Book)


def test_streamed_and_whole_answers_are_the_same(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "response_format": schema_format(), "seed": 7, "max_tokens": 400}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop"
    Book.model_validate_json(text)


def test_several_choices_with_logprobs_and_a_stop_string(client: OpenAI) -> None:
    answer = client.completions.create(
        model="demo", prompt="Colour: ", n=4, max_tokens=30, logprobs=2, seed=3, extra_body={"guided_choice": ["red", "green", "blue"]}
    )
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert {choice.text for choice in answer.choices} <= {"red", "green", "blue"}
    assert all(len(choice.logprobs.tokens) for choice in answer.choices if choice.logprobs is not None)
    stopped = client.completions.create(
        model="demo", prompt="x", max_tokens=30, stop=[";"], extra_body={"structured_outputs": {"regex": "ab;cd"}}
    )
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("ab", "stop")


def test_max_tokens_cut_it(client: OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt="x", max_tokens=5, extra_body={"guided_regex": LONG})
    assert answer.choices[0].finish_reason == "length"
    assert re.fullmatch("[a-d]+", answer.choices[0].text)


def test_what_is_wrong_is_said(client: OpenAI) -> None:
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "book", "schema": {"type": "objekt"}}}
    with pytest.raises(openai.BadRequestError, match="objekt") as caught:
        client.chat.completions.create(model="demo", messages=MESSAGES, response_format=wrong)
    assert caught.value.param == "response_format.json_schema.schema"


@pytest.mark.parametrize("length", [20, 200], ids=["whole", "split"])
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "seeded"])
def test_a_killed_worker_changes_no_token(split: Deployment, client: OpenAI, length: int, temperature: float) -> None:
    wait_until_complete(split)
    prompt = prompt_of(length, seed=11 + int(temperature))  # of its own: what is cached already is not split
    asked: dict[str, Any] = {
        "model": "demo", "prompt": prompt, "max_tokens": 200, "temperature": temperature, "seed": 9,
    }  # fmt: skip
    fields = {"guided_regex": LONG, "return_token_ids": True}
    expected = client.completions.create(**asked, extra_body={**fields, "cache_salt": "first"})
    assert re.fullmatch(LONG, expected.choices[0].text)
    with client.completions.with_streaming_response.create(**asked, stream=True, extra_body=fields) as response:
        worker = response.headers["x-polyphase-decode-worker"]
        assert (response.headers["x-polyphase-route"] == "split") == (length == 200)
        tokens: list[int] = []
        for line in response.iter_lines():
            if line.startswith("data: {"):
                tokens += json.loads(line[6:])["choices"][0].get("token_ids") or []
                if len(tokens) >= 3 and worker:
                    os.kill(split.workers()[worker].pid, signal.SIGKILL)
                    worker = ""
    assert tokens == completed_ids(expected)
    wait_until_complete(split)


def test_a_fleet_without_it_says_so() -> None:
    with Deployment("demo", "--engine", "mock", "--workers", "1") as served:
        client = OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)
        with pytest.raises(openai.BadRequestError, match="has structured output"):
            client.chat.completions.create(model="demo", messages=MESSAGES, response_format={"type": "json_object"})
