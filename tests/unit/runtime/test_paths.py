"""Sockets lie in the run folder under paths that the system takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyphase.core.errors import ConfigurationError
from polyphase.runtime import WorkerPaths
from polyphase.runtime.paths import ensure_private_folder


def test_endpoints_lie_in_the_run_folder(run_folder: Path) -> None:
    paths = WorkerPaths.of(run_folder, "decode-0")
    assert paths.request_endpoint == f"ipc://{run_folder}/sockets/decode-0.req"
    assert paths.event_endpoint == f"ipc://{run_folder}/sockets/decode-0.ev"
    ensure_private_folder(run_folder / "sockets")
    paths.pool_socket.write_text("")
    paths.remove()
    paths.remove()
    assert not paths.pool_socket.exists()


def test_a_path_too_long_for_a_socket_says_by_how_much(run_folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"too long for sockets by \d+ bytes"):
        WorkerPaths.of(run_folder / ("x" * 100), "w")


def test_a_folder_is_made_private(run_folder: Path) -> None:
    ensure_private_folder(run_folder / "a" / "b")
    assert (run_folder / "a" / "b").stat().st_mode & 0o777 == 0o700
