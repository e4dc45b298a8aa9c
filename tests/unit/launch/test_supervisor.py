"""The supervisor with small scripts as children. A child tells by files what it has come to."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from polyphase.launch.backoff import BackoffRule
from polyphase.launch.process import ProcessKind, ProcessSpec, exit_phrase
from polyphase.launch.supervisor import Exited, News, Ready, Started, StartFailed, Stopping, Supervisor, Timing

SERVE = """
import pathlib, signal, sys, time
here = pathlib.Path({folder!r})
def drain(*_):
    with (here / "order").open("a") as order:
        order.write({name!r} + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, drain)
with (here / ({name!r} + ".lives")).open("a") as lives:
    lives.write("x")
(here / ({name!r} + ".up")).touch()
while True:
    time.sleep(60)
"""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVE.replace("signal.signal(signal.SIGTERM, drain)", "")
QUICK = Timing(
    start_timeout_s=30, drain_timeout_s=30, grace_s=30, readiness_interval_s=0.01, log_interval_s=0.01, backoff=BackoffRule(0.01, 0.05, 60)
)


class Stage:
    """A supervisor with its scripts and all that it told."""

    def __init__(self, folder: Path, timing: Timing, *scripts: tuple[str, ProcessKind, str]) -> None:
        self.folder = folder
        self.news: list[News] = []
        self.names = [name for name, _, _ in scripts]
        specs = [
            ProcessSpec(name, kind, (sys.executable, "-S", "-c", script.format(folder=str(folder), name=name)))
            for name, kind, script in scripts
        ]
        self.supervisor = Supervisor(specs, folder, self.is_up, self.news.append, timing)

    async def is_up(self) -> bool:
        return all((self.folder / f"{name}.up").exists() for name in self.names)

    def pid(self, name: str) -> int:
        return next(child.pid for child in self.supervisor.children if child.spec.name == name and child.pid is not None)

    def lives(self, name: str) -> int:
        return len((self.folder / f"{name}.lives").read_text())

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[None]]:
        task = asyncio.create_task(self.supervisor.run())
        try:
            await until(lambda: self.supervisor.has_started or task.done())
            yield task
        finally:
            self.supervisor.kill()
            await asyncio.wait({task})
            assert self.left() == []

    def left(self) -> list[int]:
        return [news.pid for news in self.news if isinstance(news, Started) and Path(f"/proc/{news.pid}").exists()]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  # what is waited for happens in other processes
            await asyncio.sleep(0.01)


FRONTEND, WORKER = ProcessKind.FRONTEND, ProcessKind.WORKER


async def test_starts_all_and_ends_frontends_before_workers(tmp_path: Path):
    stage = Stage(tmp_path, QUICK, ("w0", WORKER, SERVE), ("front", FRONTEND, SERVE), ("w1", WORKER, SERVE))
    async with stage.running() as task:
        assert isinstance(stage.news[-1], Ready)
        stage.supervisor.stop()
        await task
    order = (tmp_path / "order").read_text().split()
    assert order[0] == "front"
    assert sorted(order[1:]) == ["w0", "w1"]
    assert [news for news in stage.news if isinstance(news, Stopping)] == [Stopping(("front",)), Stopping(("w0", "w1"))]


async def test_a_crashed_process_is_started_again(tmp_path: Path):
    stage = Stage(tmp_path, QUICK, ("front", FRONTEND, SERVE), ("w0", WORKER, SERVE))
    async with stage.running() as task:
        for life in (2, 3):
            os.kill(stage.pid("w0"), signal.SIGKILL)
            await until(lambda life=life: stage.lives("w0") == life)
        assert stage.lives("front") == 1
        exits = [news for news in stage.news if isinstance(news, Exited)]
        assert [(news.name, news.exit_code, news.restart_after_s) for news in exits] == [("w0", -9, 0.01), ("w0", -9, 0.02)]
        stage.supervisor.stop()
        await task


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("import sys; print('2026-01-31 12:00:00.123 ERROR   w0 there is no model folder /x'); sys.exit(1)", "there is no model folder /x"),
        ("import sys; print('gone', file=sys.stderr); sys.exit(3)", "w0 ended before it was ready, exit code 3: gone"),
        ("import os; os.kill(os.getpid(), 9)", "w0 ended before it was ready, killed by SIGKILL, and said nothing"),
    ],
)
async def test_who_ends_while_starting_ends_everything(tmp_path: Path, script: str, sentence: str):
    stage = Stage(tmp_path, QUICK, ("front", FRONTEND, SERVE), ("w0", WORKER, script))
    with pytest.raises(StartFailed) as caught:
        await stage.supervisor.run()
    assert caught.value.message == sentence
    assert stage.left() == []


async def test_two_that_fail_for_one_reason_are_one_sentence(tmp_path: Path):
    script = "import sys; print('no model'); sys.exit(1)"
    stage = Stage(tmp_path, QUICK, ("w0", WORKER, script), ("w1", WORKER, script))
    with pytest.raises(StartFailed, match=r"^no model$"):
        await stage.supervisor.run()


async def test_a_start_that_takes_too_long(tmp_path: Path):
    stage = Stage(tmp_path, Timing(start_timeout_s=0.3), ("w0", WORKER, "import time; print('loading', flush=True); time.sleep(60)"))
    with pytest.raises(StartFailed, match="not ready after 0 s; last heard from w0"):
        await stage.supervisor.run()
    assert stage.left() == []


async def test_who_does_not_end_in_time_is_killed(tmp_path: Path):
    timing = Timing(readiness_interval_s=0.01, drain_timeout_s=0.1, grace_s=0.1)
    stage = Stage(tmp_path, timing, ("front", FRONTEND, STUBBORN), ("w0", WORKER, STUBBORN))
    async with stage.running() as task:
        stage.supervisor.stop()
        await task


async def test_kill_does_not_wait(tmp_path: Path):
    stage = Stage(tmp_path, QUICK, ("front", FRONTEND, STUBBORN), ("w0", WORKER, STUBBORN))
    async with stage.running() as task:
        began_s = time.monotonic()
        stage.supervisor.stop()
        await until(lambda: isinstance(stage.news[-1], Stopping))
        stage.supervisor.kill()
        await task
        assert time.monotonic() - began_s < QUICK.grace_s


async def test_stopping_while_starting(tmp_path: Path):
    stage = Stage(tmp_path, QUICK, ("w0", WORKER, "import time; time.sleep(60)"))
    task = asyncio.create_task(stage.supervisor.run())
    await until(lambda: stage.news)
    stage.supervisor.stop()
    await task
    assert stage.left() == []


async def test_a_process_in_back_off_is_not_started_by_a_stop(tmp_path: Path):
    timing = Timing(readiness_interval_s=0.01, backoff=BackoffRule(first_s=60))
    stage = Stage(tmp_path, timing, ("w0", WORKER, SERVE))
    async with stage.running() as task:
        os.kill(stage.pid("w0"), signal.SIGKILL)
        await until(lambda: isinstance(stage.news[-1], Exited))
        stage.supervisor.stop()
        await task
    assert stage.lives("w0") == 1


async def test_cancelling_kills_everything(tmp_path: Path):
    stage = Stage(tmp_path, QUICK, ("front", FRONTEND, STUBBORN), ("w0", WORKER, STUBBORN))
    task = asyncio.create_task(stage.supervisor.run())
    await until(lambda: stage.supervisor.has_started)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stage.left() == []


async def test_a_program_that_is_not_there(tmp_path: Path):
    spec = ProcessSpec("w0", WORKER, (str(tmp_path / "nothing"),))
    supervisor = Supervisor([spec], tmp_path, lambda: asyncio.sleep(0, False), lambda news: None, QUICK)
    with pytest.raises(StartFailed, match="w0 cannot be started"):
        await supervisor.run()


async def test_output_goes_to_the_log_and_the_environment_to_the_child(tmp_path: Path):
    script = "import os, sys; print(os.environ['SHARE']); sys.exit(1)"
    spec = ProcessSpec("w0", WORKER, (sys.executable, "-c", script), {"SHARE": "two threads"})
    supervisor = Supervisor([spec], tmp_path, lambda: asyncio.sleep(0, False), lambda news: None, QUICK)
    with pytest.raises(StartFailed, match="two threads"):
        await supervisor.run()
    assert (tmp_path / "w0.log").read_text() == "two threads\n"


def test_exit_phrases():
    assert exit_phrase(0) == "exit code 0"
    assert exit_phrase(-15) == "killed by SIGTERM"
    assert exit_phrase(-200) == "killed by signal 200"
