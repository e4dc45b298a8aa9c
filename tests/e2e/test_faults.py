"""What a client sees when processes die, clients leave, or there is nothing to serve; and what is left afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from openai import OpenAI, Stream
from openai.types import Completion

from polyphase.testing import Deployment

from .conftest import GreedyTokens, prompt_of

EXACT = {"ignore_eos": True, "return_token_ids": True}


def open_stream(client: OpenAI, prompt: list[int], count: int) -> Stream[Completion]:
    return client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=count, stream=True, extra_body=EXACT)


def rest_of(stream: Stream[Completion]) -> tuple[list[int], str | None]:
    """Remaining token ids, and the finish reason."""
    ids: list[int] = []
    finish = None
    for chunk in stream:
        for choice in chunk.choices:
            ids += choice.token_ids or []  # type: ignore[attr-defined]
            finish = choice.finish_reason or finish
    return ids, finish


def first_of(stream: Stream[Completion], count: int) -> list[int]:
    ids: list[int] = []
    for chunk in stream:
        for choice in chunk.choices:
            ids += choice.token_ids or []  # type: ignore[attr-defined]
        if len(ids) >= count:
            break
    return ids


def wait_until_complete(split: Deployment) -> None:
    split.wait_for(
        lambda: len(split.health().get("models", {}).get("demo", {}).get("workers", {})) == 3, "the killed worker to be back", 100
    )


@pytest.mark.parametrize("length", [20, 300])
def test_a_killed_decode_worker_is_not_noticed(split: Deployment, client: OpenAI, greedy: GreedyTokens, length: int) -> None:
    wait_until_complete(split)
    prompt = prompt_of(length, seed=10)
    stream = open_stream(client, prompt, 200)
    request_id = stream.response.headers["x-request-id"]
    ids = first_of(stream, 20)
    worker = split.record(request_id)["decode_worker"]
    os.kill(split.workers()[worker].pid, signal.SIGKILL)
    rest, finish = rest_of(stream)
    assert ids + rest == greedy(prompt, 200)
    assert finish == "length"
    record = split.record(request_id)
    assert record["migrations"] == 1
    assert record["decode_worker"] != worker
    wait_until_complete(split)


def test_a_killed_prefill_worker_is_not_noticed(split: Deployment, client: OpenAI, greedy: GreedyTokens) -> None:
    wait_until_complete(split)
    prompts = [prompt_of(1900, seed=20 + i) for i in range(4)]
    answers: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        answers[i], _ = rest_of(open_stream(client, prompts[i], 16))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    pid = split.workers()["prefill-0"].pid
    split.wait_for(lambda: split.health()["models"]["demo"]["workers"]["prefill-0"]["running"] > 0, "the prefill worker to be busy", 30)
    os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join(60)
    assert [answers.get(i) for i in range(4)] == [greedy(prompt, 16) for prompt in prompts]
    wait_until_complete(split)


def test_a_client_that_leaves_frees_everything(split: Deployment, client: OpenAI) -> None:
    wait_until_complete(split)
    stream = open_stream(client, prompt_of(500, seed=30), 4000)
    request_id = stream.response.headers["x-request-id"]
    first_of(stream, 5)
    stream.response.close()

    def is_free() -> bool:
        workers = split.health()["models"]["demo"]["workers"].values()
        return all(w["used_block_count"] == 0 and w["running"] == 0 for w in workers)

    split.wait_for(lambda: split.record(request_id)["finish_reason"], "the frontend to notice", 30)
    split.wait_for(is_free, "the abandoned request's blocks to be free", 30)
    record = split.record(request_id)
    assert record["finish_reason"] == "cancelled"
    assert record["completion_tokens"] < 4000


def test_without_workers_the_answer_is_503_at_once(tmp_path: Path) -> None:
    with Deployment("demo", "--workers", "1") as served:
        [worker] = served.workers().values()
        supervisor = served.process
        assert supervisor is not None
        supervisor.send_signal(signal.SIGSTOP)  # so that it cannot start another one
        try:
            os.kill(worker.pid, signal.SIGKILL)
            served.wait_for(lambda: httpx.get(f"{served.url}/health").status_code == 503, "the frontend to notice", 30)
            answer = httpx.post(f"{served.url}/v1/completions", json={"model": "demo", "prompt": "x"}, timeout=10)
        finally:
            supervisor.send_signal(signal.SIGCONT)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "no_workers"


def test_sigterm_finishes_what_runs_and_leaves_nothing(greedy: GreedyTokens) -> None:
    with Deployment("demo", "--workers", "1") as served:
        client = OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        prompt = prompt_of(30, seed=40)
        stream = open_stream(client, prompt, 300)
        ids = first_of(stream, 3)
        assert served.process is not None
        served.process.send_signal(signal.SIGTERM)
        rest, finish = rest_of(stream)
        assert ids + rest == greedy(prompt, 300)
        assert finish == "length"
        assert served.process.wait(60) == 0
        assert served.pids() == set()
        left = [path for path in served.home.rglob("*") if path.name != "serve.out" and not path.is_dir()]
        assert left == []


def test_a_killed_supervisor_takes_everything_with_it() -> None:
    with Deployment("demo", "--prefill", "1", "--decode", "1") as served:
        assert served.process is not None
        assert len(served.pids()) == 4
        served.process.kill()
        served.process.wait()
        served.wait_for(lambda: served.pids() == set(), "all processes to go with their supervisor", 20)


@pytest.mark.parametrize("kind", ["missing", "empty", "torn"])
def test_a_broken_model_folder_is_one_clear_sentence(tmp_path: Path, kind: str, model_folder: Path) -> None:
    folder = tmp_path / "model"
    if kind != "missing":
        folder.mkdir()
    if kind == "torn":
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((model_folder / name).read_bytes())
        (folder / "model.safetensors").write_bytes((model_folder / "model.safetensors").read_bytes()[:5000])
    served = Deployment(folder, "--workers", "1")
    served.launch()
    assert served.process is not None
    assert served.process.wait(60) == 1
    output = served.output()
    assert "Traceback" not in output
    assert str(folder) in output.replace("\n", "")
    assert served.pids() == set()
    served.stop()


def test_a_busy_port_is_said_before_anything_is_loaded(split: Deployment) -> None:
    command = [sys.executable, "-m", "polyphase", "serve", "demo", "--port", str(split.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert str(split.port) in done.stderr
    assert "Traceback" not in done.stderr
