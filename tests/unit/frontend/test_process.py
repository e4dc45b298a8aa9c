"""`python -m polyphase.frontend` as a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

MAX_RSS_MB = 150


@pytest.fixture
def run_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ppf-", dir="/tmp") as folder:
        yield Path(folder)


def start(run_folder: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "polyphase.frontend", "--run-folder", str(run_folder), *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_it_starts_small_and_ends_well(run_folder: Path) -> None:
    port = free_port()
    process = start(run_folder, "--port", str(port))
    try:
        for _ in range(1000):
            try:
                answer = httpx.get(f"http://127.0.0.1:{port}/health")
                break
            except httpx.TransportError:
                time.sleep(0.02)
        assert answer.status_code == 503, "there are no workers"
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        assert pages * os.sysconf("SC_PAGE_SIZE") < MAX_RSS_MB * 1e6
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        _, errors = process.communicate()
    assert "Traceback" not in errors


def test_a_busy_port_is_one_sentence(run_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start(run_folder, "--port", str(port))
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert f"127.0.0.1:{port}" in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("flags", [["--port", "70000"], ["--request-timeout-s", "-1"], ["--host", "no.such.host.invalid"]])
def test_a_wrong_flag_is_one_sentence(run_folder: Path, flags: list[str]) -> None:
    process = start(run_folder, *flags)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert len(errors.splitlines()) == 1


def test_a_run_folder_that_is_open_to_others_is_refused(run_folder: Path) -> None:
    run_folder.chmod(0o755)
    process = start(run_folder, "--port", "0")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "chmod 700" in errors
