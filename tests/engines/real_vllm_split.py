"""Prefill and decode on two real vLLM servers, KV between them by NIXL: `make test-engines-vllm PYTEST_ARGS="-k split"`."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from polyphase.testing import Deployment
from tests.engines.vllm_setting import (
    ENVIRONMENT,
    MODEL,
    START_TIMEOUT_S,
    ask_engine,
    client_of,
    complete,
    engine_pids,
    engine_urls,
    is_idle,
    is_well,
    metric,
    options,
    polyphase,
    tokens_of_stream,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(START_TIMEOUT_S + 120)]
LENGTHS = [1, 2, 15, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 200, 255, 256, 257, 300, 400, 512, 513, 640, 800, 1000, 1200, 1500]


@pytest.fixture(scope="module")
def served() -> Iterator[Deployment]:
    roles = ("--prefill", "1", "--decode", "1", "--split-threshold", "1", "--split-fraction", "0")
    with Deployment(MODEL, *options(*roles), start_timeout_s=START_TIMEOUT_S, environment=ENVIRONMENT) as deployment:
        deployment.wait_for(lambda: len(deployment.workers()) == 2, "both workers", START_TIMEOUT_S)
        yield deployment


@pytest.fixture
def client(served: Deployment) -> OpenAI:
    return client_of(served)


def prompt_of(length: int, seed: int = 1) -> list[int]:
    return random.Random(seed * 10_000 + length).choices(range(100, 4000), k=length)


def split(served: Deployment, client: OpenAI, length: int) -> tuple[list[int], list[int]]:
    """A prompt and its tokens, prefill and decode apart. Both workers have to be there: on a busy machine one may be in quarantine."""
    for attempt in range(5):
        prompt = prompt_of(length, seed=100 + attempt)
        served.wait_for(lambda: is_well(served), "two workers that make progress", 90)
        answer = client.completions.with_raw_response.create(
            model="tiny", prompt=prompt, max_tokens=16, temperature=0, extra_body={"return_token_ids": True, "ignore_eos": True}
        )
        record = served.record(answer.headers["x-request-id"])
        if answer.headers["x-polyphase-route"] == "split" and not record["migrations"]:
            parsed: Any = answer.parse()
            assert record["transferred_tokens"] == length
            return prompt, parsed.choices[0].token_ids
    raise AssertionError(f"five prompts of {length} tokens were not split: {record['reason']}")


def test_tokens_are_those_of_one_engine_alone(served: Deployment, client: OpenAI) -> None:
    urls = engine_urls(served)
    fetched_before = metric(urls["decode-0"], "prompt_tokens_by_source_total", "external_kv_transfer")
    for length in LENGTHS:
        prompt, tokens = split(served, client, length)
        assert tokens == ask_engine(urls["prefill-0"], prompt, 16), length
    fetched = metric(urls["decode-0"], "prompt_tokens_by_source_total", "external_kv_transfer") - fetched_before
    assert fetched >= sum(LENGTHS) - len(LENGTHS), "the KV came from the other one; it was not computed twice"
    assert metric(urls["decode-0"], "nixl_num_failed_transfers_total") == 0


def test_streams_and_logprobs_begin_with_the_first_token(client: OpenAI) -> None:
    prompt = prompt_of(300, seed=2)
    whole = complete(client, prompt, 12, logprobs=2)
    stream = list(complete(client, prompt, 12, stream=True, logprobs=2))
    assert tokens_of_stream(stream) == whole.choices[0].token_ids
    assert len(whole.choices[0].logprobs.token_logprobs) == 12
    streamed = [one for chunk in stream for choice in chunk.choices if choice.logprobs for one in choice.logprobs.token_logprobs]
    assert streamed == pytest.approx(whole.choices[0].logprobs.token_logprobs, abs=0.05)


def test_sampled_requests_repeat_with_their_seed(client: OpenAI) -> None:
    prompt = prompt_of(100, seed=3)
    first, second, other = (complete(client, prompt, 12, temperature=1.0, seed=seed).choices[0].token_ids for seed in (5, 5, 6))
    assert first == second != other


def test_who_goes_away_leaves_nothing(served: Deployment, client: OpenAI) -> None:
    urls = engine_urls(served)
    stream = complete(client, prompt_of(700, seed=4), 3000, stream=True)
    next(iter(stream))
    stream.close()
    served.wait_for(lambda: all(is_idle(url) for url in urls.values()), "idle engines", 30)
    workers = served.health()["models"]["tiny"]["workers"]
    assert all(worker["leased_block_count"] == 0 for worker in workers.values())


def test_roles_change_while_a_stream_runs(served: Deployment, client: OpenAI) -> None:
    prompt = prompt_of(300, seed=5)
    expected = complete(client, prompt, 300).choices[0].token_ids
    stream = iter(complete(client, prompt, 300, stream=True))
    found = [token for _ in range(30) for token in tokens_of_stream([next(stream)])]
    for worker_id, role in (("prefill-0", "decode"), ("decode-0", "prefill")):
        polyphase(served, "role", worker_id, role)
    found += tokens_of_stream(stream)
    assert found == expected
    after = complete(client, prompt_of(500, seed=6), 8).choices[0].token_ids
    for worker_id, role in (("decode-0", "decode"), ("prefill-0", "prefill")):
        polyphase(served, "role", worker_id, role)
    assert complete(client, prompt_of(500, seed=6), 8).choices[0].token_ids == after


def test_a_prefill_engine_that_is_killed_costs_time_and_nothing_else(served: Deployment, client: OpenAI) -> None:
    prompts = [prompt_of(1000, seed=seed) for seed in range(7, 11)]
    urls = engine_urls(served)
    answers: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        answers[number] = complete(client, prompts[number], 16).choices[0].token_ids

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    os.kill(engine_pids(served, worker_id="prefill-0")[0], signal.SIGKILL)
    for thread in threads:
        thread.join(180)
    assert [answers.get(number) for number in range(len(prompts))] == [ask_engine(urls["decode-0"], prompt, 16) for prompt in prompts]
    served.wait_for(lambda: "prefill-0" in served.health()["models"]["tiny"]["workers"], "its next life", START_TIMEOUT_S)
    split(served, client, 900)
