"""A whole deployment before engine servers that play a recorded vLLM: start, routing by its events, and kill -9 in mid-stream."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import httpx
import pytest

from polyphase.testing import Deployment
from tests.unit.vllm.double import Recording

ROOT = Path(__file__).parents[2]
PROMPT = list(range(100, 200))
SAMPLING = {"temperature": 0, "top_p": 1, "top_k": 0}  # all of them, since the demo model has its own defaults
BODY = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "ignore_eos": True, "return_token_ids": True, **SAMPLING}


def recorded_tokens(name: str = "long") -> list[int]:
    events = Recording().exchanges[f"GenerateDialect/{name}"]["answer"].split("\n\n")
    chunks = [json.loads(event[6:]) for event in events if event.startswith("data: {")]
    return [token for chunk in chunks if chunk["choices"] for token in chunk["choices"][0]["token_ids"]]


def deployment(workers: int, *further: str, **environment: str) -> Deployment:
    command = f"{sys.executable} -m tests.unit.vllm.player"
    options = ["--engine", "vllm", "--served-model-name", "tiny", "--engine-command", command, *further]
    options += ["--workers", str(workers)] if workers else []
    return Deployment("demo", *options, environment={"PYTHONPATH": str(ROOT), **environment})


def player_pids(served: Deployment) -> dict[str, int]:
    """Of the engine behind each worker, by the folder that it was given for its events."""
    found = {}
    for pid in served.pids():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if words[1:3] == ["-m", "tests.unit.vllm.player"]:
            config = json.loads(words[words.index("--kv-events-config") + 1])
            found[Path(config["endpoint"]).parent.name] = pid
    return found


@pytest.mark.parametrize("knows_the_flag", [True, False])
def test_a_stock_server_is_started_asked_and_ended(knows_the_flag: bool) -> None:
    with deployment(1, **({"PLAYER_IS_NEW": "1"} if knows_the_flag else {})) as served:
        served.wait_for(lambda: served.health()["index"]["block_count"] >= 3, "the recorded events in the index")
        answer = httpx.post(f"{served.url}/v1/completions", json=BODY, timeout=60).json()
        logs = served.logs()
        pids = served.pids()
        served.stop()
        assert not served.pids(), pids
    assert answer["choices"][0]["token_ids"] == recorded_tokens()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 96
    assert ("this vllm does not know --enable-scale-out" in logs) is not knows_the_flag


def test_kill_9_of_an_engine_in_mid_stream_is_not_seen_by_the_client() -> None:
    with deployment(2, PLAYER_IS_NEW="1", PLAYER_PAUSE_S="0.01") as served:
        tokens: list[int] = []
        killed = ""
        with httpx.stream("POST", f"{served.url}/v1/completions", json={**BODY, "stream": True}, timeout=60) as response:
            request_id = response.headers["x-request-id"]
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                tokens += chunk["choices"][0].get("token_ids") or []
                if len(tokens) >= 5 and not killed:
                    killed = served.record(request_id)["decode_worker"]
                    os.kill(player_pids(served)[killed], signal.SIGKILL)
        assert tokens == recorded_tokens()
        served.wait_for(lambda: "vllm was killed by SIGKILL" in served.output(), "the explanation")
        served.wait_for(lambda: len(served.workers()) == 2, "the next life")


def test_prefill_and_decode_run_on_two_servers() -> None:
    """With the very params that the real prefill server gave, and the real decode server took."""
    roles = ("--prefill", "1", "--decode", "1", "--split-threshold", "1", "--split-fraction", "0")
    body = {**BODY, "prompt": list(range(300, 400)), "max_tokens": 6}
    with deployment(0, *roles, PLAYER_IS_NEW="1") as served:
        served.wait_for(lambda: len(served.workers()) == 2, "both workers")
        served.wait_for(lambda: not served.health()["models"]["tiny"]["notes"], "both at the frontend")
        answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)
        record = served.record(answer.headers["x-request-id"])
        workers = served.health()["models"]["tiny"]["workers"]
        assert served.health()["models"]["tiny"]["misfits"] == []
    assert answer.headers["x-polyphase-route"] == "split"
    assert answer.json()["choices"][0]["token_ids"] == recorded_tokens("decode")
    assert (record["prefill_worker"], record["decode_worker"], record["transferred_tokens"]) == ("prefill-0", "decode-0", 100)
    assert workers["prefill-0"]["leased_block_count"] == 0, "given back with the first token"
