from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

from polyphase.cli import doctor
from tests.unit.cli.conftest import CommandLine


def test_this_machine_can_serve(polyphase: CommandLine):
    result = polyphase("doctor")
    assert result.exit_code == 0, result.output
    for what in (
        "Python",
        "cores",
        "memory",
        "shared memory",
        "inotify",
        "open files",
        "run folder",
        "port 8000",
        "torch",
        "C++ extension",
    ):
        assert what in result.output
    assert "Polyphase can serve here." in result.output


def test_what_is_essential_and_missing_fails_with_the_way_to_mend_it(polyphase: CommandLine, monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> str:
        if name == "transformers":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    result = polyphase("doctor")
    assert result.exit_code == 1
    assert "pip install 'polyphase[torch]'" in result.output
    assert "cannot serve here yet: transformers" in result.output


def test_what_is_not_essential_does_not_fail(polyphase: CommandLine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "is_port_free", lambda host, port: False)
    monkeypatch.setattr(doctor, "_available_memory_bytes", lambda: 10**8)
    result = polyphase("doctor")
    assert result.exit_code == 0
    assert "choose another port" in result.output
    assert "lower --kv-memory" in result.output


def test_a_run_folder_that_cannot_be_used(polyphase: CommandLine, runtime_folder: Path):
    (runtime_folder / "polyphase").mkdir(mode=0o755)
    os.chmod(runtime_folder / "polyphase", 0o755)
    result = polyphase("doctor")
    assert result.exit_code == 1
    assert "chmod 700" in result.output


def test_no_memfd(polyphase: CommandLine, monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: object) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert polyphase("doctor").exit_code == 1
