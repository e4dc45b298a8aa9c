"""A name that is no folder is asked for at the hub once, and what is wrong with it is one sentence at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from polyphase.core.errors import ModelLoadError
from polyphase.engines.torch import place
from polyphase.engines.torch.place import check_on_hub
from polyphase.testing.deployment import free_port


class Hub(ThreadingHTTPServer):
    """Says of every file what it was told to."""

    def __init__(self) -> None:
        self.status = 200
        self.error_code: str | None = None
        self.request_count = 0
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.server.request_count += 1
        self.send_response(self.server.status)
        if self.server.error_code is not None:
            self.send_header("X-Error-Code", self.server.error_code)
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", "1")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        _point_at(monkeypatch, server.server_port)
        yield server
        server.shutdown()
        thread.join()


def _point_at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (404, "RepoNotFound", "no such model at"),
        (401, "RepoNotFound", "set HF_TOKEN"),
        (403, "GatedRepo", "is gated: accept its terms"),
        (404, "EntryNotFound", "has no config.json"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(remote: Hub, status: int, code: str, sentence: str) -> None:
    remote.status, remote.error_code = status, code
    with pytest.raises(ModelLoadError, match=sentence) as caught:
        check_on_hub("some/model")
    assert "some/model" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert remote.request_count == 1


@pytest.mark.parametrize("status", [200, 429, 503])
def test_what_is_there_or_will_be_is_left_to_the_library(remote: Hub, status: int) -> None:
    remote.status = status
    check_on_hub("some/model")
    assert remote.request_count == 1


def test_a_hub_that_cannot_be_reached_is_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    _point_at(monkeypatch, free_port())
    pauses: list[float] = []
    monkeypatch.setattr(place.time, "sleep", pauses.append)
    with pytest.raises(ModelLoadError, match="cannot be reached"):
        check_on_hub("some/model")
    assert pauses == [place.PAUSE_S]


def test_names_that_cannot_be(remote: Hub) -> None:
    with pytest.raises(ModelLoadError, match="neither a folder nor a possible name"):
        check_on_hub("no model")
    assert remote.request_count == 0


def test_a_cached_model_needs_no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _point_at(monkeypatch, free_port())
    folder = tmp_path / "models--some--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("1")
    (folder / "snapshots" / "1").mkdir(parents=True)
    (folder / "snapshots" / "1" / "config.json").write_text("{}")
    check_on_hub("some/model")
