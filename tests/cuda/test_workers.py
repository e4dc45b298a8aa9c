"""Two torch workers on one GPU: the prompt here, the tokens there, equal to those of one worker that does both."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from polyphase.testing import Deployment
from tests.e2e.conftest import prompt_of

EXACT = {"ignore_eos": True, "return_token_ids": True}
ON_DEVICE = ("--device", "cuda", "--dtype", "float32", "--kv-memory", "64MiB")
LENGTHS = (5, 16, 500, 1500)


def ask(served: Deployment, prompt: list[int]) -> tuple[list[int], dict[str, Any]]:
    client = OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)
    answer = client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=12, extra_body=EXACT)
    return list(answer.choices[0].token_ids), served.record(answer.id)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def aggregated() -> dict[int, list[int]]:
    with Deployment("demo", *ON_DEVICE) as served:
        return {length: ask(served, prompt_of(length, seed=length))[0] for length in LENGTHS}


@pytest.fixture(scope="module")
def split() -> Iterator[Deployment]:
    with Deployment("demo", "--prefill", "1", "--decode", "1", *ON_DEVICE) as served:
        yield served


def test_tokens_equal_those_of_one_worker(split: Deployment, aggregated: dict[int, list[int]]) -> None:
    for length in LENGTHS:
        tokens, _ = ask(split, prompt_of(length, seed=length))
        assert tokens == aggregated[length], length
    assert re.search(r"its blocks are read by cuda", split.logs()), "the workers did not use CUDA IPC"
