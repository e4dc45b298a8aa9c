"""A whole deployment before engine servers that play a recorded SGLang: start, routing by its events, and kill -9 in mid-stream."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import httpx
import pytest

from polyphase.testing import Deployment
from tests.unit.sglang.double import Recording

ROOT = Path(__file__).parents[2]
PROMPT = list(range(100, 200))
SAMPLING = {"temperature": 0, "top_p": 1, "top_k": 0}  # all of them, since the demo model has its own defaults
BODY = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "ignore_eos": True, "return_token_ids": True, **SAMPLING}


def recorded_tokens() -> list[int]:
    events = Recording().exchange("long")["answer"].split("\n\n")
    return [token for event in events if event.startswith("data: {") for token in json.loads(event[6:])["output_ids"]]


def deployment(workers: int, **environment: str) -> Deployment:
    command = f"{sys.executable} -m tests.unit.sglang.player"
    options = ["--engine", "sglang", "--served-model-name", "tiny", "--engine-command", command, "--workers", str(workers)]
    return Deployment("demo", *options, environment={"PYTHONPATH": str(ROOT), **environment})


def player_pids(served: Deployment) -> dict[str, int]:
    """Of the engine behind each worker, by the folder that it was given for its events."""
    found = {}
    for pid in served.pids():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if words[1:3] == ["-m", "tests.unit.sglang.player"]:
            config = json.loads(words[words.index("--kv-events-config") + 1])
            found[Path(config["endpoint"]).parent.name] = pid
    return found


@pytest.mark.parametrize("knows_the_flag", [True, False])
def test_a_stock_server_is_started_asked_and_ended(knows_the_flag: bool) -> None:
    with deployment(1, **({"PLAYER_IS_NEW": "1"} if knows_the_flag else {})) as served:
        served.wait_for(lambda: served.health()["index"]["block_count"] >= 8, "the recorded events in the index")
        answer = httpx.post(f"{served.url}/v1/completions", json=BODY, timeout=60).json()
        logs = served.logs()
        pids = served.pids()
        served.stop()
        assert not served.pids(), pids
    assert answer["choices"][0]["token_ids"] == recorded_tokens()
    assert ("this sglang does not know --incremental-streaming-output" in logs) is not knows_the_flag


def test_kill_9_of_an_engine_in_mid_stream_is_not_seen_by_the_client() -> None:
    with deployment(2, PLAYER_IS_NEW="1", PLAYER_PAUSE_S="0.005") as served:
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
        served.wait_for(lambda: "sglang was killed by SIGKILL" in served.output(), "the explanation")
        served.wait_for(lambda: len(served.workers()) == 2, "the next life")
