from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from polyphase.cli.app import app


@pytest.fixture(autouse=True)
def runtime_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for run folders of our own, short enough for sockets; what else runs on this machine is not seen."""
    folder = Path(tempfile.mkdtemp(prefix="pp-", dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    yield folder
    shutil.rmtree(folder)


class CommandLine:
    def __call__(self, *arguments: str, typed: str | None = None) -> Result:
        return CliRunner().invoke(app, list(arguments), input=typed)


@pytest.fixture
def polyphase() -> CommandLine:
    return CommandLine()
