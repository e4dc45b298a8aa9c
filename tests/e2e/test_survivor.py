"""What another worker has cached of a request is pulled from there, not computed again; a worker that says nothing delays nobody much."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from polyphase.testing import Deployment

from .conftest import GreedyTokens, prompt_of
from .test_faults import first_of, open_stream, rest_of, wait_until_complete

EXACT = {"ignore_eos": True, "return_token_ids": True}
LENGTH = 1000
TRIES = 4  # a holder has half a second to answer, which a machine that is busy with other things may not give it
FULL = (LENGTH - 1) // 16 * 16  # tokens in full blocks that a cache can spare


@pytest.fixture(scope="module")
def trio() -> Iterator[Deployment]:
    """Three workers that take turns, wherever a prompt is cached."""
    with Deployment("demo", "--workers", "3", "--policy", "round-robin", "--threads", "1") as served:
        yield served


@pytest.fixture
def client(trio: Deployment) -> OpenAI:
    wait_until_complete(trio)
    return OpenAI(base_url=f"{trio.url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(client: OpenAI, served: Deployment, prompt: list[int], count: int = 6, **fields: Any) -> tuple[list[int], dict[str, Any]]:
    """Token ids, and the frontend's record."""
    answer = client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=count, extra_body={**EXACT, **fields})
    return list(answer.choices[0].token_ids), served.record(answer.id)  # type: ignore[attr-defined]


def prompt_leg(record: dict[str, Any]) -> dict[str, Any]:
    leg: dict[str, Any] = record["routes"][-1]["legs"][0]
    return leg


def assert_nothing_is_held(served: Deployment) -> None:
    def is_free() -> bool:
        workers = served.health()["models"]["demo"]["workers"].values()
        return all(worker["used_block_count"] == 0 and worker["running"] == 0 for worker in workers)

    served.wait_for(is_free, "all blocks to be free", 20)


def test_a_less_loaded_worker_pulls_what_another_one_holds(trio: Deployment, client: OpenAI, greedy: GreedyTokens) -> None:
    for seed in range(100, 100 + TRIES):
        prompt = prompt_of(LENGTH, seed)
        wanted = greedy(prompt, 6)
        first, holder = ask(client, trio, prompt)
        second, record = ask(client, trio, prompt)
        assert first == second == wanted
        assert record["decode_worker"] != holder["decode_worker"]
        if record["transferred_tokens"]:
            break
    assert (record["cached_tokens"], record["transferred_tokens"]) == (0, FULL)
    pull = record["routes"][0]["pull"]
    assert (pull["holder"], pull["tokens"], pull["is_wanted"]) == (holder["decode_worker"], FULL, True)
    assert any(f"from {pull['holder']}" in (moment["detail"] or "") for moment in record["timeline"])
    assert_nothing_is_held(trio)


def test_blocks_of_another_tenant_are_not_pulled(trio: Deployment, client: OpenAI, greedy: GreedyTokens) -> None:
    prompt = prompt_of(LENGTH, seed=2)
    wanted = greedy(prompt, 6)
    ask(client, trio, prompt, cache_salt="a")
    for salt, transferred in (("b", 0), (None, 0), ("a", FULL)):
        ids, record = ask(client, trio, prompt, **({} if salt is None else {"cache_salt": salt}))
        assert ids == wanted
        came_or_was_there = record["transferred_tokens"] + record["cached_tokens"]
        assert came_or_was_there == transferred, salt


def test_after_a_death_a_survivor_gives_what_the_dead_worker_had(trio: Deployment, client: OpenAI, greedy: GreedyTokens) -> None:
    for seed in range(200, 200 + TRIES):
        wait_until_complete(trio)
        prompt = prompt_of(LENGTH, seed)
        _, survivor = ask(client, trio, prompt)
        stream = open_stream(client, prompt, 200)
        request_id = stream.response.headers["x-request-id"]
        ids = first_of(stream, 20)
        dead = trio.record(request_id)["decode_worker"]
        os.kill(trio.workers()[dead].pid, signal.SIGKILL)
        rest, finish = rest_of(stream)
        assert ids + rest == greedy(prompt, 200)
        assert finish == "length"
        record = trio.record(request_id)
        assert record["migrations"] == 1
        assert record["decode_worker"] not in (dead, survivor["decode_worker"])
        if prompt_leg(record)["transferred_tokens"]:
            break
    assert record["routes"][-1]["pull"]["holder"] == survivor["decode_worker"]
    assert prompt_leg(record)["transferred_tokens"] == FULL
    assert record["routes"][-1]["tokens"] - FULL < 200, "what was generated, and less than a block of the prompt, is all that is computed"
    assert_nothing_is_held(trio)


def test_a_stopped_holder_delays_nobody_much(trio: Deployment, client: OpenAI, greedy: GreedyTokens) -> None:
    """It is named as long as nobody has noticed that it stands still."""
    prompt = prompt_of(LENGTH, seed=4)
    wanted = greedy(prompt, 6)
    _, record = ask(client, trio, prompt)
    pid = trio.workers()[record["decode_worker"]].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        ids, record = ask(client, trio, prompt)
        took_s = time.monotonic() - began_s
    finally:
        os.kill(pid, signal.SIGCONT)
    assert ids == wanted
    assert record["transferred_tokens"] == 0
    assert prompt_leg(record)["transfer_ms"] < 1000, "half a second is the most that is waited for an answer"
    assert took_s < 20
    assert_nothing_is_held(trio)


def test_a_holder_that_drains_gives_what_it_has(greedy: GreedyTokens) -> None:
    """A decode worker's blocks go to a prefill worker and back just as well: roles do not matter, the last word of a worker neither."""
    with Deployment("demo", "--prefill", "1", "--decode", "2", "--threads", "1", "--split-threshold", "4000") as served:
        client = OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)
        prompt = prompt_of(LENGTH, seed=5)
        stream = open_stream(client, prompt, 1500)  # keeps its worker in the fleet while that drains
        ids = first_of(stream, 5)
        holder = served.record(stream.response.headers["x-request-id"])["decode_worker"]
        os.kill(served.workers()[holder].pid, signal.SIGTERM)
        served.wait_for(lambda: (entry := served.workers().get(holder)) is None or entry.is_draining, "it to drain")
        answer, record = ask(client, served, prompt)
        assert answer == greedy(prompt, 6)
        assert record["decode_worker"] != holder
        # Pulled from the draining worker, or brought along by that one's own stream; or it had gone by then.
        assert record["transferred_tokens"] + record["cached_tokens"] in (0, FULL)
        rest, finish = rest_of(stream)
        assert (len(ids + rest), finish) == (1500, "length")


def test_it_can_be_switched_off(greedy: GreedyTokens) -> None:
    with Deployment("demo", "--workers", "2", "--policy", "round-robin", "--kv-pull", "off", "--threads", "1") as served:
        client = OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)
        prompt = prompt_of(LENGTH, seed=6)
        for _ in range(2):
            ids, record = ask(client, served, prompt)
            assert ids == greedy(prompt, 6)
            assert (record["transferred_tokens"], record["cached_tokens"], record["routes"][0]["pull"]) == (0, 0, None)
