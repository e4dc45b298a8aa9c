"""A prefill worker on one host, a decode worker and the frontend on another: the KV travels over TCP, and the tokens are one worker's."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from polyphase.testing.deployment import free_port

from .conftest import MODEL_FOLDER, GreedyTokens, prompt_of
from .hosts import CabledHosts, LoopbackHosts, processes, two_hosts

COUNT = 12


@dataclass
class TwoHosts:
    hosts: CabledHosts | LoopbackHosts
    url: str
    folder: Path
    processes: list[subprocess.Popen[bytes]]

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 90) -> None:
        end_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end_s or any(process.poll() is not None for process in self.processes):
                raise AssertionError("\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in self.folder.glob("*.log")))
            time.sleep(0.05)

    def worker_count(self) -> int:
        try:
            models = httpx.get(f"{self.url}/health", timeout=10).json()["models"]
        except httpx.TransportError:
            return 0
        return len(models.get("demo", {}).get("workers", {}))

    def ask(self, prompt: list[int]) -> tuple[list[int], dict[str, Any]]:
        """Tokens, and the frontend's record of the request."""
        body = {"model": "demo", "prompt": prompt, "max_tokens": COUNT, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        response = httpx.post(f"{self.url}/v1/completions", json=body, timeout=100).raise_for_status()
        record = httpx.get(f"{self.url}/debug/requests/{response.headers['x-request-id']}", timeout=10).json()
        return response.json()["choices"][0]["token_ids"], record


@pytest.fixture(scope="module")
def served() -> Iterator[TwoHosts]:
    folder = Path(tempfile.mkdtemp(prefix="pp-", dir="/tmp"))  # short: socket paths end at about 100 bytes
    token = folder / "token"
    token.write_bytes(b"a secret of the two hosts")
    port = free_port()
    run_folder = ["--run-folder", str(folder / "run")]
    with two_hosts() as hosts, processes(folder) as start:
        running: list[subprocess.Popen[bytes]] = []
        for name, host, prefix in (("prefill", hosts.there, hosts.prefix), ("decode", hosts.here, [])):
            worker = [sys.executable, "-m", "tests.e2e.other_host", f"host-of-{name}", *run_folder, "--worker-id", f"{name}-0"]
            about = ["--role", name, "--model", str(MODEL_FOLDER), "--name", "demo", "--thread-count", "1", "--drain-timeout-s", "3"]
            running.append(start(name, [*prefix, *worker, *about, "--transfer-address", f"{host}:0", "--transfer-token-file", str(token)]))
        frontend = [sys.executable, "-m", "polyphase.frontend", *run_folder, "--port", str(port), "--split-threshold", "64"]
        running.append(start("frontend", frontend))
        found = TwoHosts(hosts, f"http://127.0.0.1:{port}", folder, running)
        found.wait_for(lambda: found.worker_count() == 2)
        yield found
    shutil.rmtree(folder)


@pytest.mark.parametrize("length", [100, 1500])
def test_a_request_crosses_the_hosts_and_its_kv_goes_by_tcp(served: TwoHosts, greedy: GreedyTokens, length: int) -> None:
    before = served.hosts.received_bytes()
    tokens, record = served.ask(prompt_of(length, seed=7))
    assert tokens == greedy(prompt_of(length, seed=7), COUNT)
    assert (record["prefill_worker"], record["decode_worker"]) == ("prefill-0", "decode-0")
    assert record["transferred_tokens"] == length
    assert record["kv_bytes_moved"] > 0
    after = served.hosts.received_bytes()
    if before is not None and after is not None:  # every byte of it went over the cable
        assert after - before >= record["kv_bytes_moved"]
    assert "met agent prefill-0: its blocks are read by tcp" in (served.folder / "decode.log").read_text()


def test_when_the_cable_is_cut_the_prompt_is_computed_here(served: TwoHosts, greedy: GreedyTokens) -> None:
    """Last, since the link does not come back. Without a cable, the prefill worker's agent is stopped short in its place."""
    cable = served.hosts.cable
    if cable is not None:
        subprocess.run(["ip", "link", "set", cable, "down"], check=True)
    tokens, record = served.ask(prompt_of(400, seed=8))
    assert tokens == greedy(prompt_of(400, seed=8), COUNT)
    if cable is not None:
        assert record["transferred_tokens"] == 0
    assert "Traceback" not in (served.folder / "decode.log").read_text()
