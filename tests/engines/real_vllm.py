"""Polyphase before a real `vllm serve`: `make test-engines-vllm`. Not part of `make test`, whose vLLM is played from recordings.

One server for all tests of this file: it starts in one to three minutes on a small machine, and wants an API key. The tests build on each
other and run in this order.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIError, OpenAI

from polyphase.testing import Deployment
from polyphase.testing.deployment import DeploymentFailed
from tests.engines.vllm_setting import (
    API_KEY,
    ENVIRONMENT,
    KEYLESS,
    MODEL,
    START_TIMEOUT_S,
    ask_engine,
    client_of,
    complete,
    engine_pids,
    engine_urls,
    is_idle,
    options,
)

PROMPT = list(range(100, 300))
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(START_TIMEOUT_S + 120)]


@pytest.fixture(scope="module")
def served() -> Iterator[Deployment]:
    with Deployment(MODEL, *options(), start_timeout_s=START_TIMEOUT_S, environment=ENVIRONMENT) as deployment:
        yield deployment


@pytest.fixture
def client(served: Deployment) -> OpenAI:
    return client_of(served)


def engine_url(served: Deployment) -> str:
    return engine_urls(served)["worker-0"]


def test_whole_and_streamed_answers_are_the_same(client: OpenAI) -> None:
    whole = complete(client, PROMPT, 20)
    chunks = list(complete(client, PROMPT, 20, stream=True, stream_options={"include_usage": True}))
    assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens == 20
    assert whole.choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert len(chunks) > 5, "it is streamed"


def test_tokens_are_those_of_the_engine_asked_directly(served: Deployment, client: OpenAI) -> None:
    for length in (1, 31, 32, 33, 500, 1500):
        prompt = [100 + (7 * place) % 900 for place in range(length)]
        assert complete(client, prompt).choices[0].token_ids == ask_engine(engine_url(served), prompt), length


def test_chat_with_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "kabas loden"}], max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    assert answer.usage is not None
    assert content is not None
    assert len(content) == answer.usage.completion_tokens
    assert all(len(one.top_logprobs) == 3 and one.logprob <= 0 for one in content)


def test_the_router_knows_what_the_engine_found(served: Deployment, client: OpenAI) -> None:
    prompt = [3000 + place % 700 for place in range(320)]
    before = served.health()["index"]["block_count"]
    first = complete(client, prompt)
    served.wait_for(lambda: served.health()["index"]["block_count"] >= before + 10, "the prompt's blocks in the index")
    answer = client.completions.with_raw_response.create(model="tiny", prompt=[*prompt, 9], max_tokens=4, temperature=0)
    usage = answer.parse().usage
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 320
    record = served.record(answer.headers["x-request-id"])
    assert (record["cached_tokens"], record["predicted_cached_tokens"]) == (320, 320), record


def test_a_salt_keeps_tenants_apart(client: OpenAI) -> None:
    prompt = [2000 + place % 700 for place in range(200)]
    found = []
    for salt in ("a", "a", "b"):
        body = {"cache_salt": salt, "return_token_ids": True}
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=2, temperature=0, extra_body=body)
        found.append(answer.usage.prompt_tokens_details.cached_tokens)  # type: ignore[union-attr]
    assert found == [0, 192, 0]


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[0-9]{3}-[a-c]{2}"}}, r"[0-9]{3}-[a-c]{2}"),
        ({"structured_outputs": {"choice": ["red", "größer"]}}, r"red|größer"),
        ({"structured_outputs": {"grammar": 'root ::= "a" [0-9] "b"'}}, r"a[0-9]b"),
        ({"guided_json": {"enum": [17]}}, r"17"),
    ],
)
def test_structured_output(client: OpenAI, fields: dict[str, Any], pattern: str) -> None:
    answer = client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=60, temperature=0, extra_body=fields)
    assert re.fullmatch(pattern, answer.choices[0].text)
    assert answer.choices[0].finish_reason == "stop"


def test_who_goes_away_frees_the_engine(served: Deployment, client: OpenAI) -> None:
    stream = complete(client, PROMPT, 3000, stream=True)
    next(iter(stream))
    stream.close()
    served.wait_for(lambda: is_idle(engine_url(served)), "the engine to be idle; 3000 tokens take much longer", timeout_s=30)


def test_what_the_engine_does_not_take_is_the_callers_fault(client: OpenAI) -> None:
    with pytest.raises(APIError) as raised:
        complete(client, [1] * 5000)
    assert getattr(raised.value, "status_code", None) == 400


def test_the_key_is_wanted_and_shown_nowhere(served: Deployment, client: OpenAI) -> None:
    assert complete(client, PROMPT, 2).usage.completion_tokens == 2
    url = engine_url(served)
    body = {"model": "tiny", "prompt": [1], "max_tokens": 1}
    assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 401
    assert API_KEY not in served.logs() + served.output()
    assert not any(API_KEY.encode() in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in served.pids())


def test_a_running_server_is_attached_to(served: Deployment) -> None:
    """By a second deployment; at its end the server goes on."""
    attach = ("--engine", "vllm", "--attach", engine_url(served), "--served-model-name", "tiny")
    with Deployment(MODEL, *attach, start_timeout_s=90, environment=ENVIRONMENT) as attached:
        client = client_of(attached)
        assert complete(client, PROMPT).choices[0].token_ids == ask_engine(engine_url(served), PROMPT)
        attached.wait_for(lambda: attached.health()["index"]["block_count"] > 0, "what the engine holds, by its events")
    assert httpx.get(f"{engine_url(served)}/health", timeout=30).status_code == 200


def test_without_the_key_it_is_said_how_to_give_it(served: Deployment) -> None:
    attach = ("--engine", "vllm", "--attach", engine_url(served), "--served-model-name", "tiny")
    with pytest.raises(DeploymentFailed, match="wants an API key, or another one: set POLYPHASE_ENGINE_API_KEY"):
        Deployment(MODEL, *attach, start_timeout_s=90, environment=KEYLESS).start()


def test_a_stopped_engine_is_noticed_and_taken_back(served: Deployment, client: OpenAI) -> None:
    """SIGSTOP of the engine's core: its web server, and /health, go on as if nothing were."""
    complete(client, PROMPT, 40)
    cores = engine_pids(served, "EngineCor")  # of a name, the system keeps 15 characters
    assert cores
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(complete(client, PROMPT, 40)))

    def is_stalled() -> bool:
        return any(worker.get("is_stalled") for worker in served.health()["models"]["tiny"]["workers"].values())

    for pid in cores:
        os.kill(pid, signal.SIGSTOP)
    try:
        thread.start()
        served.wait_for(is_stalled, "the quarantine", timeout_s=90)
        assert httpx.get(f"{engine_url(served)}/health", timeout=30).status_code == 200
    finally:
        for pid in cores:
            os.kill(pid, signal.SIGCONT)
    served.wait_for(lambda: not is_stalled(), "the end of the quarantine", timeout_s=60)
    thread.join(120)
    assert complete(client, PROMPT, 4).usage.completion_tokens == 4


def test_a_killed_engine_is_explained_and_started_again(served: Deployment, client: OpenAI) -> None:
    stream = complete(client, PROMPT, 3000, stream=True)
    next(iter(stream))
    before = set(engine_pids(served))
    os.kill(engine_pids(served)[0], signal.SIGKILL)
    with pytest.raises(APIError, match="killed by SIGKILL"):
        for _ in stream:
            pass
    served.wait_for(lambda: "the worker broke down: vllm was killed by SIGKILL" in served.output(), "the explanation")
    served.wait_for(lambda: before.isdisjoint(engine_pids(served)), "the end of what the engine had started")
    served.wait_for(lambda: served.health().get("status") == "healthy" and served.workers(), "the next life", START_TIMEOUT_S)
    assert complete(client, PROMPT, 4).usage.completion_tokens == 4


def test_nothing_is_left_running() -> None:
    """A deployment of its own, ended while it starts, as by an impatient person."""
    deployment = Deployment(MODEL, *options(), environment=ENVIRONMENT)
    deployment.launch()
    try:
        deployment.wait_for(lambda: len(engine_pids(deployment)) > 1, "the engine's further processes", 120)
        pids = engine_pids(deployment)
        deployment.stop()
        deployment.wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the end of all processes", 30)
    finally:
        deployment.kill()
        subprocess.run(["rm", "-rf", str(deployment.home)], check=False)
