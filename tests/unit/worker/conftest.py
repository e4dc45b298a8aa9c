"""Workers to talk to: a host in this process, and whole processes, all on the fake engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from polyphase.runtime import Registry, WorkerPaths
from polyphase.runtime.paths import ensure_private_folder
from polyphase.wire.cards import Role, WorkerEntry
from polyphase.worker.host import HostSettings, WorkerHost
from polyphase.worker.options import TransferOptions
from polyphase.worker.transfer import join_transfer
from tests.unit.worker.fake_engine import FakeEngine
from tests.unit.worker.peer import Peer

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def run_folder() -> Iterator[Path]:
    """With a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="pp-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    async with Peer() as peer:
        yield peer


class Hosted:
    """A host that runs as a task here."""

    def __init__(self, run_folder: Path, worker_id: str, engine: FakeEngine, drain_timeout_s: float) -> None:
        paths = self.paths = WorkerPaths.of(run_folder, worker_id)
        ensure_private_folder(paths.request_socket.parent)
        self.entry = WorkerEntry(
            worker_id=worker_id,
            epoch=1,
            role=Role.BOTH,
            model="fake",
            pid=os.getpid(),
            host="here",
            request_endpoint=paths.request_endpoint,
            event_endpoint=paths.event_endpoint,
        )
        self.engine = engine
        self.transfer = contextlib.ExitStack()
        joined = join_transfer(engine, self.entry, str(paths.pool_socket), TransferOptions(None, None))
        self.agent, region = self.transfer.enter_context(joined)
        settings = HostSettings(self.entry, paths, drain_timeout_s, self.agent, region)
        self.host = WorkerHost(engine, Registry(run_folder).claim(worker_id), settings)
        self.task = asyncio.create_task(self.host.run())


HostStarter = Callable[..., Hosted]


@pytest.fixture
async def start_host(run_folder: Path) -> AsyncIterator[HostStarter]:
    started: list[Hosted] = []

    def start(worker_id: str = "w", step_s: float = 0.001, drain_timeout_s: float = 20) -> Hosted:
        started.append(Hosted(run_folder, worker_id, FakeEngine(step_s), drain_timeout_s))
        return started[-1]

    yield start
    for hosted in started:
        hosted.task.cancel()
        with contextlib.suppress(asyncio.CancelledError, BaseExceptionGroup):
            await hosted.task
        hosted.transfer.close()
        hosted.engine.close()


ProcessStarter = Callable[..., Awaitable[asyncio.subprocess.Process]]


@pytest.fixture
async def start_process(run_folder: Path) -> AsyncIterator[ProcessStarter]:
    """Starts `python -m polyphase.worker` on the fake engine; its standard error is a pipe."""
    started: list[asyncio.subprocess.Process] = []

    async def start(
        worker_id: str = "w", model: str = "fake", step_s: float = 0.001, flags: tuple[str, ...] = ()
    ) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "polyphase.worker", "--run-folder", str(run_folder), "--worker-id", worker_id),
            *("--engine", "tests.unit.worker.fake_engine:load", "--model", model, *flags),
            stderr=asyncio.subprocess.PIPE,
            cwd=REPOSITORY,
            env={**os.environ, "FAKE_STEP_S": str(step_s)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()
