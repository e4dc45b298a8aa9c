"""A private run folder with a path short enough for sockets."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def run_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pp-", dir="/tmp") as path:
        yield Path(path)
