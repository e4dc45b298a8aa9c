"""`polyphase status` on a run folder with a worker that answers, one that does not, and one that is not there."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from polyphase.cli.status import (
    _index,
    _names,
    _queues,
    _shares,
    _shortcomings,
    _streams,
    _warnings,
    ask_frontend,
    engine_lines,
    format_age,
    format_count,
    status_table,
)
from polyphase.launch.run_folder import DeploymentRecord, RunFolder
from polyphase.runtime import PeerId, Registry, WorkerPaths, WorkerServer
from polyphase.runtime.paths import ensure_private_folder
from polyphase.wire.cards import Role, WorkerEntry, WorkerStatus
from polyphase.wire.events import Load
from polyphase.wire.requests import Answer, Query, ToWorker
from tests.unit.cli.conftest import CommandLine

LOAD = Load(
    running_count=3, waiting_count=2, block_count=200, used_block_count=50, cached_block_count=20,
    prompt_tokens_total=1000, cached_prompt_tokens_total=250, generated_tokens_total=12_345,
)  # fmt: skip


class FakeWorker:
    """Answers STATUS on a loop of its own."""

    def __init__(self, run_folder: Path, worker_id: str, *, answers: bool, is_draining: bool = False) -> None:
        paths = WorkerPaths.of(run_folder, worker_id)
        ensure_private_folder(paths.request_socket.parent)
        self._entry = WorkerEntry(
            worker_id=worker_id, epoch=1, role=Role.DECODE, model="demo", pid=os.getpid(), host="here",
            request_endpoint=paths.request_endpoint, event_endpoint=paths.event_endpoint, is_draining=is_draining,
        )  # fmt: skip
        self._answers = answers
        self._registry = Registry(run_folder)
        self._up = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))

    async def _serve(self) -> None:
        self._stop = asyncio.Event()

        def answer(peer: PeerId, message: ToWorker) -> None:
            if self._answers and isinstance(message, Query):
                status = WorkerStatus(entry=self._entry, load=LOAD, uptime_s=190, rss_bytes=300 * 1024**2)
                server.send(peer, Answer(message.query_id, status))

        server = WorkerServer(self._entry.request_endpoint, answer)
        with self._registry.announce(self._entry):
            running = asyncio.create_task(server.run())
            self._up.set()
            await self._stop.wait()
            running.cancel()
            server.close()

    def __enter__(self) -> None:
        self._thread.start()
        assert self._up.wait(30)

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        self._loop.close()


@pytest.fixture
def folder(runtime_folder: Path) -> Iterator[RunFolder]:
    with RunFolder.claim("default", os.environ) as claimed:
        claimed.publish(
            DeploymentRecord(
                name="default", model="demo", url="http://127.0.0.1:8000", pid=os.getpid(), run_folder=str(claimed.path),
                worker_ids=["decode-0", "decode-1"], started_unix_s=time.time() - 70,
            )
        )  # fmt: skip
        yield claimed


def test_shows_what_the_workers_say(polyphase: CommandLine, folder: RunFolder):
    with FakeWorker(folder.path, "decode-0", answers=True):
        result = polyphase("status")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("default: demo at http://127.0.0.1:8000, up 1m1")
    row = next(line for line in lines if line.startswith("decode-0")).split()
    assert row == ["decode-0", "decode", "ready", "3", "2", "50/200", "25%", "1000", "12.3k", "10%", "300", "MiB", "3m10s"]
    assert "not there" in next(line for line in lines if line.startswith("decode-1"))


def test_fits_a_narrow_terminal(polyphase: CommandLine, folder: RunFolder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    with FakeWorker(folder.path, "decode-0", answers=True):
        lines = polyphase("status").output.splitlines()
    assert lines[2].split() == ["decode-0", "decode", "ready", "3", "2", "50/200", "25%", "1000", "12.3k"]


def test_a_worker_that_is_there_and_silent(polyphase: CommandLine, folder: RunFolder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("polyphase.cli.status.ANSWER_TIMEOUT_S", 0.1)
    with FakeWorker(folder.path, "decode-0", answers=False):
        result = polyphase("status", "--name", "default")
    assert "does not answer" in result.output


def test_a_draining_worker(polyphase: CommandLine, folder: RunFolder):
    with FakeWorker(folder.path, "decode-0", answers=True, is_draining=True):
        assert "draining" in polyphase("status").output


@pytest.mark.parametrize(("count", "text"), [(0, "0"), (9999, "9999"), (10_000, "10.0k"), (2_500_000, "2.5M")])
def test_counts(count: int, text: str):
    assert format_count(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0s"), (59.9, "59s"), (60, "1m00s"), (7500, "2h05m"), (356400, "4d03h")])
def test_ages(seconds: float, text: str):
    assert format_age(seconds) == text


def test_what_the_router_complains_of(polyphase: CommandLine, folder: RunFolder, monkeypatch: pytest.MonkeyPatch):
    drift = {"reason": "block-size", "message": "of 20 requests, 20 found other cached tokens than predicted"}
    page = {"models": {"demo": {"workers": {"decode-0": {"drift": drift}, "decode-1": {"drift": None}, "old": {}}}}}

    async def ask(url: str) -> list[str]:
        assert url == "http://127.0.0.1:8000"
        return _warnings(page)

    monkeypatch.setattr("polyphase.cli.status.ask_frontend", ask)
    lines = polyphase("status").output.splitlines()
    assert lines[-1] == "decode-0: cache predictions drift (block-size): of 20 requests, 20 found other cached tokens than predicted"
    assert _warnings({"error": {"message": "not a frontend"}}) == _warnings([]) == []


async def test_a_frontend_that_is_not_there():
    assert await ask_frontend("http://127.0.0.1:1") == []


def test_queues_of_the_frontend_are_told() -> None:
    waiting = {"waits_for_prefill_worker": False, "requests": 12, "prompt_tokens": 34_000, "oldest_wait_s": 3.2, "drain_time_s": 8.1}
    one = {**waiting, "waits_for_prefill_worker": True, "requests": 1, "drain_time_s": None}
    assert _queues({"models": {"demo": {"workers": {}, "queues": [waiting, one]}, "other": {"workers": {}}}}) == [
        "queue of demo: 12 requests wait for a worker with room (34.0k tokens), the longest for 3s; sent on within 8s",
        "queue of demo: 1 request waits for a prefill worker with room (34.0k tokens), the longest for 3s",
    ]
    assert _queues({}) == _queues([]) == []


def test_the_index_and_broken_streams_are_told() -> None:
    whole = {"is_synced": True, "gaps": 0, "drifts": 0, "repairs": 0, "snapshots": 1}
    mended = {"is_synced": False, "gaps": 3, "drifts": 1, "repairs": 2, "snapshots": 2}
    index = {"kind": "native", "block_count": 12_345, "capacity": 4_000_000, "heap_bytes": 1 << 20, "forgotten_block_count": 0}
    page = {"index": index, "models": {"m": {"workers": {"b": {"stream": mended}, "a": {"stream": whole}, "c": {"stream": None}}}}}
    assert _index(page) == ["prefix index (native): 12.3k blocks of 4.0M at most, 1.0 MiB"]
    assert _streams(page) == ["b: event stream: not up to date; 3 gaps (2 closed), 1 times drifted, 2 snapshots"]
    index["forgotten_block_count"] = 70_000
    assert _index(page)[0].endswith("; 70.0k were forgotten for want of room")
    assert _index({"error": 1}) == _index([]) == _streams([]) == []


def test_engines_and_what_they_can() -> None:
    def status(engine: str, *abilities: str) -> WorkerStatus:
        entry = WorkerEntry(
            worker_id="w", epoch=1, role=Role.BOTH, model="m", pid=1, host="h", request_endpoint="ipc:///r", event_endpoint="ipc:///e"
        )
        return WorkerStatus(entry=entry, load=Load(), uptime_s=1, rss_bytes=1, engine=engine, abilities=list(abilities))

    vllm, torch = status("vllm", "kv-events"), status("torch", "kv-events", "hand-over")
    assert engine_lines({"a": vllm, "b": vllm, "gone": None}) == ["engine vllm: kv-events"]
    assert engine_lines({"a": vllm, "b": torch}) == ["engine vllm: kv-events (a)", "engine torch: kv-events, hand-over (b)"]


def test_names_shares_and_those_turned_away_are_told() -> None:
    model = {"workers": {}, "names": ["demo", "gpt-4", "sql"], "weights": {"stable": 97.0, "canary": 3.0, "cloud": 0.0}}
    page = {"models": {"demo": model, "other": {"workers": {}, "names": ["other"], "weights": {}}}, "turned_away": {"w": "it is odd"}}
    assert _names(page) == ["demo is also served as gpt-4, sql"]
    assert _shares(page) == ["shares of demo: stable 97%, canary 3%, cloud in reserve"]
    assert _warnings(page) == ["w: gets no requests: it is odd"]
    assert _names([]) == _shares([]) == _names({"error": 1}) == []


def test_workers_are_shown_by_model() -> None:
    def status(worker_id: str, model: str) -> WorkerStatus:
        entry = WorkerEntry(
            worker_id=worker_id, epoch=1, role=Role.BOTH, model=model, pid=1, host="h", request_endpoint="", event_endpoint=""
        )
        return WorkerStatus(entry=entry, load=LOAD, uptime_s=1, rss_bytes=1)

    answers = {"w0": status("w0", "large"), "w1": status("w1", "demo"), "w2": None}
    shown = list(status_table(["w0", "w1", "w2", "w3"], answers, is_wide=False).columns[0].cells)
    assert [str(cell) for cell in shown] == ["demo", "w1", "large", "w0", "of no known model", "w2", "w3"]
    prefill = msgspec.structs.replace(status("w0", "large").entry, role=Role.PREFILL)
    others = [prefill, status("w1", "demo").entry]
    assert _shortcomings(others) == ["large: no decode worker is there: prefill workers serve requests whole, if their engine can"]
    alone = status_table(["w0"], {"w0": answers["w0"]}, is_wide=False)
    assert [str(cell) for cell in alone.columns[0].cells] == ["w0"]
