"""What the tests before a real vLLM have in common: how it is started, asked, and found among the processes.

ENGINE_PYTHON names the interpreter that has vLLM, and ENGINE_MODEL the folder that tools/make_tiny_model.py wrote.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from polyphase.testing import Deployment

START_TIMEOUT_S = 600.0
API_KEY = "a-key-that-no-log-may-show"
MODEL = os.environ.get("ENGINE_MODEL", "")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    "VLLM_SERVER_DEV_MODE": "1",
    "POLYPHASE_ENGINE_API_KEY": API_KEY,
}
KEYLESS = {**ENVIRONMENT, "POLYPHASE_ENGINE_API_KEY": ""}


def options(*further: str, engine_args: str = "", max_running: int = 16) -> list[str]:
    return [
        *("--engine", "vllm", "--engine-python", os.environ.get("ENGINE_PYTHON", ""), "--served-model-name", "tiny"),
        *("--block-size", "32", "--kv-memory", "128MiB", "--context-length", "4096", "--max-running", str(max_running)),
        *("--start-timeout", f"{START_TIMEOUT_S:.0f}s", "--engine-args", f"--enforce-eager {engine_args}".strip(), *further),
    ]


def client_of(served: Deployment) -> OpenAI:
    return OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=180)


def complete(client: OpenAI, prompt: list[int], count: int = 8, **fields: Any) -> Any:
    extra = {"return_token_ids": True, "ignore_eos": True, **fields.pop("extra_body", {})}
    return client.completions.create(model="tiny", prompt=prompt, max_tokens=count, extra_body=extra, **{"temperature": 0, **fields})


def tokens_of_stream(stream: Any) -> list[int]:
    return [token for chunk in stream for choice in chunk.choices for token in choice.token_ids or []]


def engine_urls(served: Deployment) -> dict[str, str]:
    """By worker, of its latest life."""
    found = {}
    for path in sorted(served.home.rglob("*.log")):
        said = re.findall(r"vLLM \S+ at (http://127\.0\.0\.1:\d+):", path.read_text(errors="replace"))
        if said:
            found[path.name.removesuffix(".log")] = said[-1]
    return found


def ask_engine(url: str, prompt: list[int], count: int = 8, **fields: Any) -> list[int]:
    """Past Polyphase."""
    wanted = {"temperature": 0, "ignore_eos": True, "return_token_ids": True, **fields}
    body = {"model": "tiny", "prompt": prompt, "max_tokens": count, **wanted}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=180, headers={"authorization": f"Bearer {API_KEY}"})
    tokens: list[int] = answer.raise_for_status().json()["choices"][0]["token_ids"]
    return tokens


def metric(url: str, name: str, *parts: str) -> float:
    """Sum over all samples of `vllm:name` whose line holds all `parts`."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{name}{{") and all(part in line for part in parts))


def is_idle(url: str) -> bool:
    return not metric(url, "num_requests_running") and not metric(url, "num_requests_waiting")


def engine_pids(served: Deployment, name: str = "", worker_id: str = "") -> list[int]:
    """Processes of the groups behind the guards, the first one first. `name`: part of what they call themselves; `worker_id`: only its."""
    guards = {pid for pid in served.pids() if b"polyphase.engines.served.guard" in _read(pid, "cmdline")}
    if worker_id:
        pid = served.workers()[worker_id].pid
        guards = {guard for guard in guards if _stat(guard)[0] == pid}
    stats = {int(folder.name): _stat(int(folder.name)) for folder in Path("/proc").iterdir() if folder.name.isdigit()}
    groups = {pid for pid, (parent, _, _, state) in stats.items() if parent in guards and state != "Z"}
    return sorted(pid for pid, (_, group, command, state) in stats.items() if group in groups and state != "Z" and name in command)


def _stat(pid: int) -> tuple[int, int, str, str]:
    """Parent, group, command, state."""
    command, _, rest = _read(pid, "stat").decode(errors="replace").rpartition(")")
    state, parent, group = rest.split()[:3] if rest else ("Z", "0", "0")
    return int(parent), int(group), command.partition("(")[2], state


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def is_well(served: Deployment, count: int = 2) -> bool:
    """Whether so many workers are there and make progress."""
    workers = served.health().get("models", {}).get("tiny", {}).get("workers", {})
    return len(workers) >= count and not any(worker["is_stalled"] for worker in workers.values())


def polyphase(served: Deployment, *arguments: str) -> str:
    """A command about the deployment, and what it says."""
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(served.home), "NO_COLOR": "1", "COLUMNS": "140"}
    command = [sys.executable, "-m", "polyphase", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout
