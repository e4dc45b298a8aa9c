"""Engine servers as children: what they say, how they end, and that nothing of them is left. Small Python programs stand for engines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from polyphase.core.errors import ModelLoadError
from polyphase.engines.served.process import ServerProcess, complaint_of

SLEEPER = "import time; print('up', flush=True); time.sleep(600)"
PARENT = (
    "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    "print('child', child.pid, flush=True); time.sleep(600)"
)


def python(program: str) -> ServerProcess:
    return ServerProcess("toy", [sys.executable, "-c", program], {})


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def child_of(server: ServerProcess) -> int:
    until(lambda: server.lines)
    return int(server.lines[0].split()[1])


def test_it_is_waited_for_and_stopped() -> None:
    server = python(SLEEPER)
    server.wait_until(lambda: server.lines == ["up"], lambda lines: "", 30)
    assert not server.has_ended()
    server.stop()
    assert server.has_ended()
    server.stop()


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        ("raise ValueError('no such block size')", "toy ended (exit code 1): ValueError: no such block size"),
        ("import sys; sys.exit(3)", "toy ended (exit code 3)"),
        ("import os; os.kill(os.getpid(), 9)", "toy was killed by SIGKILL: somebody did that, or the kernel for want of memory"),
        ("import os; os.kill(os.getpid(), 11)", "toy ended (killed by SIGSEGV)"),
    ],
)
def test_a_crash_is_one_sentence(program: str, sentence: str) -> None:
    server = python(program)
    with pytest.raises(ModelLoadError) as raised:
        server.wait_until(lambda: False, lambda lines: "", 30)
    assert raised.value.message == sentence
    server.stop()


def test_a_command_that_does_not_exist() -> None:
    server = ServerProcess("toy", ["/no/such/program"], {})
    with pytest.raises(ModelLoadError, match="error: /no/such/program cannot be started: No such file or directory"):
        server.wait_until(lambda: False, lambda lines: "", 30)


def test_too_slow() -> None:
    server = python(SLEEPER)
    with pytest.raises(ModelLoadError, match="toy is not ready after 0 s; last seen: it dreams"):
        server.wait_until(lambda: False, lambda lines: "it dreams", 0.1)
    server.stop()


def test_what_it_started_ends_with_it() -> None:
    server = python(PARENT)
    child = child_of(server)
    server.stop()
    until(lambda: not is_alive(child))


def test_what_it_started_ends_when_it_crashes() -> None:
    server = python(PARENT)
    child = child_of(server)
    (engine,) = [int(pid) for pid in subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(server.pid)], text=True).split()]
    os.kill(engine, signal.SIGKILL)
    until(server.has_ended)
    until(lambda: not is_alive(child))


def test_it_ends_when_the_worker_is_killed() -> None:
    program = (
        "from polyphase.engines.served.process import ServerProcess; import sys, time;"
        f"server = ServerProcess('toy', [sys.executable, '-c', {PARENT!r}], {{}});"
        "\nwhile not server.lines: time.sleep(0.02)\nprint(server.lines[0], flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        child = int(worker.stdout.readline().split()[1])
        worker.kill()
    until(lambda: not is_alive(child))


def test_the_cause_is_told_and_not_who_points_to_it() -> None:
    lines = [
        "(EngineCore pid=7) ERROR 11-24 [core.py:9] ValueError: No common block size for 16",
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    assert complaint_of(lines) == "ValueError: No common block size for 16"
