from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

import polyphase as package
from tests.unit.cli.conftest import CommandLine


@pytest.mark.parametrize("command", ["serve", "demo", "status", "chat", "doctor", "version"])
def test_every_command_has_help(polyphase: CommandLine, command: str):
    result = polyphase(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output
    assert command in polyphase("--help").output


@pytest.mark.parametrize("how", ["version", "--version", "-V"])
def test_version(polyphase: CommandLine, how: str):
    result = polyphase(how)
    assert result.exit_code == 0
    assert result.output.strip() == package.__version__


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["serve", "/no/such/folder"], "there is no model folder /no/such/folder"),
        (["serve", "demo", "--port", "x"], "--port 'x' should be a valid integer"),
        (["serve", "demo", "--kv-memory", "lots"], "--kv-memory: 'lots' is not a size"),
        (["serve", "demo", "--workers", "1", "--decode", "2"], "cannot be combined"),
        (["serve", "demo", "--config", "/none.toml"], "cannot read the configuration file /none.toml"),
        (["serve", "demo", "--policy", "best"], "choose one of kv, least-loaded, round-robin"),
        (["status"], "no deployment is running on this machine"),
        (["status", "--name", "x"], "no deployment is running on this machine"),
        (["chat"], "no deployment is running on this machine"),
        (["chat", "--url", "http://127.0.0.1:9"], "nothing answers at http://127.0.0.1:9"),
        (["chat", "--url", "not a url"], "nothing answers at"),
    ],
)
def test_errors_are_one_sentence_and_exit_code_1(polyphase: CommandLine, arguments: list[str], sentence: str):
    result = polyphase(*arguments)
    assert result.exit_code == 1, result.output
    assert sentence in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_port_in_use_is_said_before_anything_starts(polyphase: CommandLine, runtime_folder: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        result = polyphase("serve", "demo", "--port", str(taken.getsockname()[1]))
    assert result.exit_code == 1
    assert "is in use" in result.stderr
    assert list(runtime_folder.iterdir()) == []


def test_help_loads_little():
    """Seconds on a busy machine say nothing; what is loaded does."""
    heavy = ("torch", "transformers", "openai", "httpx", "pydantic", "zmq", "numpy")
    script = (
        "import sys, polyphase.cli; sys.argv = ['polyphase', '--help']\n"
        "try: polyphase.cli.main()\n"
        f"except SystemExit: print('LOADED', [m for m in {heavy!r} if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "LOADED []"
