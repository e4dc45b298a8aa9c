"""A whole deployment before processes that speak TensorRT-LLM's protocol: start, routing by its events, kill -9, two phases."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import httpx
import pytest

from polyphase.testing import Deployment
from tests.unit.trtllm.double import next_token, write_model

ROOT = Path(__file__).parents[2]
PROMPT = list(range(100, 200))
BODY = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


def deployment(model: Path, *further: str, **environment: str) -> Deployment:
    command = f"{sys.executable} -m tests.unit.trtllm.player"
    options = ["--engine", "trtllm", "--served-model-name", "tiny", "--engine-command", command, *further]
    return Deployment(model, *options, environment={"PYTHONPATH": str(ROOT), **environment})


def expected_tokens(count: int = 40) -> list[int]:
    tokens = list(PROMPT)
    while len(tokens) < len(PROMPT) + count:
        tokens.append(next_token(tokens))
    return tokens[len(PROMPT) :]


def player_pids(served: Deployment) -> dict[str, int]:
    """Of the engine behind each worker, by the folder of its options."""
    found = {}
    for pid in served.pids():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if words[1:3] == ["-m", "tests.unit.trtllm.player"]:
            found[Path(words[words.index("--extra_llm_api_options") + 1]).parent.name] = pid
    return found


def test_a_stock_server_is_started_asked_and_ended(model: Path) -> None:
    with deployment(model) as served:
        answers = [httpx.post(f"{served.url}/v1/completions", json=BODY, timeout=60).json() for _ in range(2)]
        served.wait_for(lambda: served.health()["index"]["block_count"] >= 3, "its events in the index")
        assert served.health()["models"]["tiny"]["workers"]["worker-0"]["engine"] == "trtllm"
        home = served.home
        said = served.command("status", "--name", "default").communicate(timeout=60)[0]
        pids = served.pids()
        served.stop()
        assert not served.pids(), pids
    assert [answer["choices"][0]["token_ids"] for answer in answers] == [expected_tokens()] * 2
    assert answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 96
    assert "engine trtllm: kv-events, structured-output" in said, home


def test_kill_9_of_an_engine_in_mid_stream_is_not_seen_by_the_client(model: Path) -> None:
    with deployment(model, "--workers", "2", PLAYER_PAUSE_S="0.01") as served:
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
        assert tokens == expected_tokens()
        served.wait_for(lambda: "trtllm was killed by SIGKILL" in served.output(), "the explanation")
        served.wait_for(lambda: len(served.workers()) == 2, "the next life")


def test_prefill_and_decode_run_on_two_servers(model: Path, tmp_path: Path) -> None:
    roles = ("--prefill", "1", "--decode", "1", "--split-threshold", "1", "--split-fraction", "0")
    with deployment(model, *roles, PLAYER_CONTEXTS=str(tmp_path)) as served:
        served.wait_for(lambda: len(served.workers()) == 2, "both workers")
        served.wait_for(lambda: not served.health()["models"]["tiny"]["notes"], "both at the frontend")
        assert served.health()["models"]["tiny"]["misfits"] == []
        answer = httpx.post(f"{served.url}/v1/completions", json=BODY, timeout=60)
        record = served.record(answer.headers["x-request-id"])
    assert answer.headers["x-polyphase-route"] == "split"
    assert answer.json()["choices"][0]["token_ids"] == expected_tokens()
    assert (record["prefill_worker"], record["decode_worker"]) == ("prefill-0", "decode-0")
    assert not list(tmp_path.iterdir()), "what the one left was fetched by the other"
