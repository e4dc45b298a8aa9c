"""The commands that a newcomer types, run as they would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from polyphase.testing import Deployment


def run(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(home), "NO_COLOR": "1", "COLUMNS": "160"}
    command = [sys.executable, "-m", "polyphase", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)


def test_demo_holds_its_conversation_and_leaves_nothing(tmp_path: Path) -> None:
    done = run("demo", "--once", home=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("prefill on prefill-0, decode on decode-") >= 4  # the first turn, and others with news of their own
    assert "prefill and decode on decode-" in done.stdout
    assert "I am Polyphase's little demo model." in done.stdout
    assert "textwrap.shorten(text, width, **kwargs)" in done.stdout
    assert "KiB of KV moved" in done.stdout
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []


def test_status_shows_every_worker(split: Deployment) -> None:
    done = run("status", home=split.home)
    assert done.returncode == 0, done.stderr
    for name in ("prefill-0", "decode-0", "decode-1"):
        assert name in done.stdout


def test_status_says_when_nothing_runs(tmp_path: Path) -> None:
    done = run("status", home=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "polyphase serve" in done.stderr


def test_doctor_finds_this_machine_fit(tmp_path: Path) -> None:
    done = run("doctor", home=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "torch" in done.stdout


def test_chat_answers_from_the_terminal(split: Deployment) -> None:
    command = [sys.executable, "-m", "polyphase", "chat", "--url", split.url, "--temperature", "0"]
    done = subprocess.run(command, input="Who are you?\n/quit\n", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "little demo model" in done.stdout
