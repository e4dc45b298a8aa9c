"""Two real vLLM servers, and a torch worker beside them, under one model name: `make test-engines-vllm PYTEST_ARGS="-k pair"`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from openai import APIStatusError, OpenAI

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
    is_well,
    metric,
    options,
    polyphase,
    tokens_of_stream,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(START_TIMEOUT_S + 120)]
MAX_RUNNING = 4


@pytest.fixture(scope="module")
def served() -> Iterator[Deployment]:
    given = options("--workers", "2", "--max-queued-requests", "6", "--max-queue-wait", "120s", max_running=MAX_RUNNING)
    with Deployment(MODEL, *given, start_timeout_s=START_TIMEOUT_S, environment=ENVIRONMENT) as deployment:
        deployment.wait_for(lambda: len(deployment.workers()) == 2, "both workers", START_TIMEOUT_S)
        yield deployment


@pytest.fixture
def client(served: Deployment) -> OpenAI:
    return client_of(served)


def prompt_of(number: int, length: int) -> list[int]:
    return [100 + (number * 977 + 13 * place * place + 7 * place) % 3900 for place in range(length)]


def worker_of(served: Deployment, request_id: str) -> str:
    worker: str = served.record(request_id)["decode_worker"]
    return worker


def test_conversations_go_where_their_beginning_is_cached(served: Deployment, client: OpenAI) -> None:
    """By what the engines themselves report: each turn finds the one before, whichever of the two has it."""
    conversations = {number: prompt_of(number, 320) for number in range(4)}
    hits_before = sum(metric(url, "prefix_cache_hits_total") for url in engine_urls(served).values())
    homes: dict[int, set[str]] = {number: set() for number in conversations}
    for turn in range(3):
        for number, prompt in conversations.items():
            known = len(prompt) - (0 if turn == 0 else 65)  # what the turn before had computed
            answer = client.completions.with_raw_response.create(
                model="tiny", prompt=prompt, max_tokens=24, temperature=0, extra_body={"return_token_ids": True, "ignore_eos": True}
            )
            parsed: Any = answer.parse()
            cached = parsed.usage.prompt_tokens_details.cached_tokens
            assert cached == 0 if turn == 0 else cached >= known // 32 * 32 - 32, (turn, number)
            homes[number].add(answer.headers["x-polyphase-decode-worker"])
            held = served.health()["index"]["block_count"]
            conversations[number] = prompt + parsed.choices[0].token_ids + prompt_of(number + 100 * turn, 41)
            assert held > 0
    assert all(len(found) == 1 for found in homes.values()), homes
    assert len(set.union(*homes.values())) == 2, "both were used"
    hits = sum(metric(url, "prefix_cache_hits_total") for url in engine_urls(served).values()) - hits_before
    assert hits >= 4 * (288 + 352)


def test_a_full_deployment_queues_and_then_refuses_with_a_time(served: Deployment) -> None:
    client = client_of(served)
    count = 2 * MAX_RUNNING + 30
    outcomes: list[Any] = [None] * count

    def ask(number: int) -> None:
        try:
            outcomes[number] = complete(client, prompt_of(500 + number, 40), 60).usage.completion_tokens
        except APIStatusError as error:
            outcomes[number] = error

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    refused = [one for one in outcomes if isinstance(one, APIStatusError)]
    assert len([one for one in outcomes if one == 60]) + len(refused) == count, "nothing is lost"
    assert refused
    assert len(refused) < count - MAX_RUNNING
    for error in refused:
        assert error.status_code in (429, 503), error
        assert int(error.response.headers["retry-after"]) >= 1


def test_who_sleeps_gets_nothing_until_it_is_woken(served: Deployment, client: OpenAI) -> None:
    served.wait_for(lambda: is_well(served), "two workers", 60)
    assert "worker-0 is asleep" in polyphase(served, "sleep", "worker-0")
    assert "asleep" in polyphase(served, "status")
    for number in range(70, 74):
        answer = client.completions.with_raw_response.create(model="tiny", prompt=prompt_of(number, 64), max_tokens=4, temperature=0)
        assert answer.headers["x-polyphase-decode-worker"] == "worker-1"
    assert "worker-0 is awake" in polyphase(served, "wake", "worker-0")
    used = set()
    for number in range(80, 88):
        answer = client.completions.with_raw_response.create(model="tiny", prompt=prompt_of(number, 64), max_tokens=4, temperature=0)
        used.add(answer.headers["x-polyphase-decode-worker"])
    assert "worker-0" in used


def test_a_stopped_engine_loses_its_streams_to_the_other(served: Deployment, client: OpenAI) -> None:
    served.wait_for(lambda: is_well(served), "two workers", 60)
    prompt = prompt_of(20, 200)
    expected = complete(client, prompt, 200).choices[0].token_ids
    response = client.completions.with_raw_response.create(
        model="tiny", prompt=prompt, max_tokens=200, temperature=0, stream=True, extra_body={"return_token_ids": True, "ignore_eos": True}
    )
    stream = iter(response.parse())
    found = tokens_of_stream([next(stream) for _ in range(10)])
    victim = worker_of(served, response.headers["x-request-id"])
    cores = engine_pids(served, "EngineCor", victim)
    for pid in cores:
        os.kill(pid, signal.SIGSTOP)
    try:
        found += tokens_of_stream(stream)
        assert found == expected
        assert worker_of(served, response.headers["x-request-id"]) != victim
        assert served.health()["models"]["tiny"]["workers"][victim]["is_stalled"]
    finally:
        for pid in cores:
            os.kill(pid, signal.SIGCONT)
    served.wait_for(lambda: is_well(served), "the end of the quarantine", 90)


def test_a_killed_engine_loses_its_streams_to_the_other_and_returns(served: Deployment, client: OpenAI) -> None:
    prompt = prompt_of(30, 200)
    expected = complete(client, prompt, 200).choices[0].token_ids
    response = client.completions.with_raw_response.create(
        model="tiny", prompt=prompt, max_tokens=200, temperature=0, stream=True, extra_body={"return_token_ids": True, "ignore_eos": True}
    )
    stream = iter(response.parse())
    found = tokens_of_stream([next(stream) for _ in range(10)])
    victim = worker_of(served, response.headers["x-request-id"])
    os.kill(engine_pids(served, worker_id=victim)[0], signal.SIGKILL)
    found += tokens_of_stream(stream)
    assert found == expected
    record = served.record(response.headers["x-request-id"])
    assert (record["migrations"], record["decode_worker"] != victim) == (1, True)
    served.wait_for(lambda: is_well(served), "the next life of the one that was killed", START_TIMEOUT_S)


def test_a_torch_worker_serves_the_same_model_beside_them(served: Deployment, client: OpenAI) -> None:
    command = [
        *(sys.executable, "-m", "polyphase.worker", "--run-folder", str(served.run_folder), "--worker-id", "torch-0"),
        *("--engine", "torch", "--model", MODEL, "--name", "tiny", "--block-size", "32", "--context-length", "4096"),
        *("--dtype", "bfloat16", "--kv-bytes", str(64 << 20), "--thread-count", "1"),
    ]
    worker = subprocess.Popen(command, env={**os.environ, "XDG_RUNTIME_DIR": str(served.home)})
    try:
        served.wait_for(lambda: "torch-0" in served.health()["models"]["tiny"]["workers"], "the torch worker", 120)
        used = set()
        for number in range(40, 52):
            answer = client.completions.with_raw_response.create(model="tiny", prompt=prompt_of(number, 64), max_tokens=4, temperature=0)
            used.add(answer.headers["x-polyphase-decode-worker"])
        assert "torch-0" in used
        assert used & {"worker-0", "worker-1"}
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
        prompt = prompt_of(60, 64)
        assert complete(client, prompt).choices[0].token_ids == ask_engine(engine_urls(served)["worker-0"], prompt)
    finally:
        worker.kill()
        worker.wait()
