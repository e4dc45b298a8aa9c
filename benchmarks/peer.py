"""Runs the peer's side of a benchmark in the peer's own environment, where that is installed.

Dynamo is looked for in $PEER_HOME/dynamo/venv, by default ~/.cache/polyphase-peers/dynamo/venv, and its model folder beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from harness import STDERR

TIMEOUT_S = 1800


def home() -> Path:
    return Path(os.environ.get("PEER_HOME", Path.home() / ".cache" / "polyphase-peers"))


def figures(script: str, *arguments: str) -> dict[str, float]:
    """What `script`, beside this file, prints as its last line; empty, with a word on stderr, where the peer is not there or fails."""
    python = home() / "dynamo" / "venv" / "bin" / "python"
    if not python.exists():
        STDERR.print("the peer is not installed; its figures stay empty")
        return {}
    command = [python, Path(__file__).with_name(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode != 0:
        STDERR.print(f"the peer could not be measured: {done.stderr.strip()[-400:]}", markup=False)
        return {}
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
