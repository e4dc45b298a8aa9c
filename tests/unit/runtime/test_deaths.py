"""A dying process is noticed while it still holds everything; one that lives, is stopped, or has its number is not taken for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from polyphase.runtime import DeathWatch
from polyphase.runtime.deaths import _is_dying, start_ticks
from tests.unit.runtime.waiting import eventually

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc elsewhere")


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline()
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def watching(told: list[str]) -> contextlib.closing[DeathWatch]:
    return contextlib.closing(DeathWatch(told.append, lambda: True))


async def test_a_kill_is_noticed_and_told_once(child: subprocess.Popen[bytes]) -> None:
    told: list[str] = []
    with watching(told) as deaths:
        assert deaths.watch("w", child.pid, start_ticks(child.pid))
        looking = asyncio.create_task(deaths.run())
        await asyncio.sleep(0.05)
        assert told == []
        child.kill()
        await eventually(lambda: told == ["w"])
        deaths.look()
        assert told == ["w"]
        looking.cancel()


def test_a_killed_process_that_nobody_has_waited_for_counts_as_dying(child: subprocess.Popen[bytes]) -> None:
    told: list[str] = []
    with watching(told) as deaths:
        deaths.watch("w", child.pid, start_ticks(child.pid))
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie
        deaths.look()
    assert told == ["w"]


def test_a_stopped_process_lives_until_it_is_killed(child: subprocess.Popen[bytes]) -> None:
    told: list[str] = []
    with watching(told) as deaths:
        deaths.watch("w", child.pid, start_ticks(child.pid))
        os.kill(child.pid, signal.SIGSTOP)
        os.kill(child.pid, signal.SIGTERM)  # which waits
        deaths.look()
        assert told == []
        child.kill()
        child.wait()
        deaths.look()
        assert told == ["w"]


def test_a_process_that_ends_by_itself_is_noticed() -> None:
    told: list[str] = []
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process, watching(told) as deaths:
        assert deaths.watch("w", process.pid, start_ticks(process.pid))
        process.communicate(b"\n")
        deaths.look()
    assert told == ["w"]


def test_another_process_of_this_number_is_not_watched(child: subprocess.Popen[bytes]) -> None:
    with watching([]) as deaths:
        assert not deaths.watch("w", child.pid, start_ticks(child.pid) + 1)
        assert not deaths.watch("w", child.pid, 0)
        assert not deaths.watch("w", 2**22 + 1, 7)


def test_files_are_closed() -> None:
    before = len(os.listdir("/proc/self/fd"))
    told: list[str] = []
    with watching(told) as deaths:
        for _ in range(3):
            assert deaths.watch("w", os.getpid(), start_ticks(os.getpid()))
        deaths.forget("w")
        deaths.forget("w")
        assert deaths.watch("v", os.getpid(), start_ticks(os.getpid()))
        assert not deaths.watch("x", os.getpid(), 1)
    assert len(os.listdir("/proc/self/fd")) == before
    assert told == []


def test_a_kill_that_waits_shows_before_the_memory_has_gone(tmp_path: Path) -> None:
    """Between the signal and its effect a busy machine may let seconds pass."""
    status = "Name:\tpython\nVmSize:\t  9000 kB\nThreads:\t7\nSigPnd:\t{:016x}\nShdPnd:\t{:016x}\nSigBlk:\tffffffffffffffff\n"
    for pending, shared, expected in ((0, 0, False), (0x100, 0, True), (0, 0x100, True), (0x4000, 0x4002, False), (0, 0x4100, True)):
        (tmp_path / "status").write_text(status.format(pending, shared))
        fd = os.open(tmp_path / "status", os.O_RDONLY)
        try:
            assert _is_dying(fd) is expected, (pending, shared)
        finally:
            os.close(fd)
