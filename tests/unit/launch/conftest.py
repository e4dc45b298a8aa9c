from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def runtime_folder() -> Iterator[Path]:
    """Stands for $XDG_RUNTIME_DIR. Short, because paths of sockets are limited."""
    folder = Path(tempfile.mkdtemp(prefix="pp-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)
