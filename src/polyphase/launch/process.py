"""One child process: how it is started, ended and heard."""

from __future__ import annotations

import asyncio
import enum
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from polyphase.launch.log_file import LogFile


class ProcessKind(enum.StrEnum):
    FRONTEND = "frontend"
    WORKER = "worker"


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    name: str  # unique in the deployment; also the name of the log
    kind: ProcessKind
    arguments: tuple[str, ...]  # the program first
    environment: Mapping[str, str] = field(default_factory=dict)  # on top of the supervisor's own


def exit_phrase(exit_code: int) -> str:
    """`exit code 1`, `killed by SIGKILL`."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    return f"killed by {name}"


class ChildProcess:
    """Started as often as needed. A session of its own keeps a terminal's Ctrl-C from it: the supervisor tells it when to end."""

    def __init__(self, spec: ProcessSpec, logs_folder: Path) -> None:
        self.spec = spec
        self.log = LogFile(logs_folder / f"{spec.name}.log")
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """None while it does not run."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        """Raises: OSError if the program cannot be started."""
        output = self.log.open_for_process()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.spec.arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **self.spec.environment},
                start_new_session=True,
            )
        finally:
            os.close(output)

    async def wait(self) -> int:
        """Exit code of the present life; negative for a signal. Cancel: the process runs on."""
        assert self._process is not None, f"{self.spec.name} was never started"
        return await self._process.wait()

    def terminate(self) -> None:
        """Ask it to drain and end."""
        if self.pid is not None:
            self._signal_group(signal.SIGTERM, self.pid)

    def kill(self) -> None:
        """End it and whatever it started."""
        if self.pid is not None:
            self._signal_group(signal.SIGKILL, self.pid)

    def _signal_group(self, number: signal.Signals, pid: int) -> None:
        try:
            if number is signal.SIGKILL:
                os.killpg(pid, number)
            else:
                os.kill(pid, number)
        except ProcessLookupError:
            pass  # ended, and not waited for yet
