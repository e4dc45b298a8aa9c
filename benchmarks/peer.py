"""Runs the peer's side of a benchmark in the peer's own environment, where that is installed.

Dynamo is looked for in $PEER_HOME/dynamo/venv, by default ~/.cache/polyphase-peers/dynamo/venv, and its model folder beside it; NIXL in
$PEER_HOME/nixl/venv.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


# NIXL, for benchmarks/transfer.py.


def nixl_python() -> Path:
    return home() / "nixl" / "venv" / "bin" / "python"


def install_nixl() -> None:
    """An environment with NIXL and numpy. `--no-deps`, since its dependencies ask for CUDA and torch, which the CPU paths do not need."""
    if nixl_python().exists():
        return
    folder = nixl_python().parents[1]
    STDERR.print(f"installing NIXL into {folder}")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "numpy"], check=True)
    subprocess.run([*pip, "--no-deps", "nixl", "nixl-cu12"], check=True)


class Talking:
    """A process that answers each line of JSON with one."""

    def __init__(self, *command: object) -> None:
        self._process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def hear(self) -> dict[str, Any]:
        """Raises: RuntimeError with the end of its standard error if it has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        while line and not line.startswith("{"):  # its library logs to standard output
            line = self._process.stdout.readline()
        if not line:
            assert self._process.stderr is not None
            raise RuntimeError(f"the peer ended: {self._process.stderr.read()[-800:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, words: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        return self.hear()

    def stop(self) -> None:
        self._process.communicate()  # closes its standard input, upon which it ends


@contextmanager
def nixl(sizes: tuple[int, int] | None) -> Iterator[Talking | None]:
    """A reader of another process' pool; None where NIXL is not installed, or with `sizes` None. `sizes`: bytes of pool and block."""
    if sizes is None or not nixl_python().exists():
        if sizes is not None:
            STDERR.print("NIXL is not installed; its figures stay empty (python benchmarks/transfer.py --install-peer)")
        yield None
        return
    script = Path(__file__).with_name("peer_nixl.py")
    owner = Talking(nixl_python(), script, "owner", *sizes)
    try:
        told = owner.hear()
        reader = Talking(nixl_python(), script, "reader", *sizes)
        try:
            reader.ask(told)
            yield reader
        finally:
            reader.stop()
    finally:
        owner.stop()
