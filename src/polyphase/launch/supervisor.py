"""Keeps processes running: starts them together, starts again what crashes, ends them in order.

    starting ──all ready──► running ──stop()──► frontends drain ──► workers drain ──► ended
        │                      │ a process ends: start it again after a back-off        ▲
        └─ a process ends ─► StartFailed: everything is killed          kill() ─────────┘ at any time

While starting, the end of any process is final, because it would end again: a folder without a model does not mend itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from polyphase.core.errors import ConfigurationError
from polyphase.launch.backoff import Backoff, BackoffRule
from polyphase.launch.process import ChildProcess, ProcessKind, ProcessSpec, exit_phrase


@dataclass(frozen=True, slots=True)
class Started:
    name: str
    pid: int


@dataclass(frozen=True, slots=True)
class Exited:
    """A process ended that should not have. It starts again after `restart_after_s`."""

    name: str
    exit_code: int
    last_words: str
    restart_after_s: float


@dataclass(frozen=True, slots=True)
class Ready:
    after_s: float


@dataclass(frozen=True, slots=True)
class Stopping:
    """These are told to drain; `names` is empty when everything is killed instead."""

    names: tuple[str, ...]


News = Started | Exited | Ready | Stopping


class StartFailed(ConfigurationError):
    """The deployment cannot run as asked. The message is the failed process's own, or says what happened to it."""

    code = "start_failed"
    stage = "launch"


@dataclass(frozen=True, slots=True)
class Timing:
    start_timeout_s: float = 600.0
    drain_timeout_s: float = 30.0  # that a process has to finish what it does, once told to
    grace_s: float = 5.0  # beyond that, until it is killed; and all that one has which is not ready yet
    readiness_interval_s: float = 0.1
    log_interval_s: float = 10.0
    backoff: BackoffRule = field(default_factory=BackoffRule)


class Supervisor:
    """Owner: whoever runs `run`; when it returns or raises, no process is left."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        logs_folder: Path,
        is_ready: Callable[[], Awaitable[bool]],
        tell: Callable[[News], None],
        timing: Timing = Timing(),
    ) -> None:
        """`is_ready` is asked again and again until it says so once; `tell` gets the news, on the loop."""
        self.children = [ChildProcess(spec, logs_folder) for spec in specs]
        self._is_ready = is_ready
        self._tell = tell
        self._timing = timing
        self._ready = asyncio.Event()
        self._stop = asyncio.Event()
        self._kill = asyncio.Event()

    @property
    def has_started(self) -> bool:
        """Whether everything was ready once."""
        return self._ready.is_set()

    def stop(self) -> None:
        """Drain and end everything. Idempotent."""
        self._stop.set()

    def kill(self) -> None:
        """End everything at once."""
        self._kill.set()
        self._stop.set()

    async def run(self) -> None:
        """Until stopped.

        Raises: StartFailed if a process ends before all are ready, or they are not ready in time.
        Cancel: everything is killed.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                keepers = [tasks.create_task(self._keep(child), name=f"keep {child.spec.name}") for child in self.children]
                others = [tasks.create_task(self._watch_start(), name="readiness"), tasks.create_task(self._trim_logs(), name="logs")]
                await self._stop.wait()
                await self._shut_down()
                for task in (*keepers, *others):
                    task.cancel()
        except BaseExceptionGroup as group:
            failures = group.subgroup(StartFailed)
            if failures is None:
                raise
            raise _first(failures) from None
        finally:
            await self._kill_all()

    async def _keep(self, child: ChildProcess) -> None:
        backoff = Backoff(self._timing.backoff)
        while not self._stop.is_set():
            started_s = time.monotonic()
            try:
                await child.start()
            except OSError as error:
                raise StartFailed(f"{child.spec.name} cannot be started: {error}") from None
            self._tell(Started(child.spec.name, child.pid or 0))
            exit_code = await child.wait()
            if self._stop.is_set():
                return
            last_words = child.log.last_error()
            if not self._ready.is_set():
                raise StartFailed(_why_start_failed(child, exit_code, last_words))
            delay_s = backoff.after_life_of(time.monotonic() - started_s)
            self._tell(Exited(child.spec.name, exit_code, last_words, delay_s))
            await _wait_for(self._stop, delay_s)

    async def _watch_start(self) -> None:
        began_s = time.monotonic()
        while not await self._is_ready():
            if time.monotonic() - began_s > self._timing.start_timeout_s:
                raise StartFailed(self._why_start_timed_out())
            await asyncio.sleep(self._timing.readiness_interval_s)
        if not self._stop.is_set():
            self._ready.set()
            self._tell(Ready(time.monotonic() - began_s))

    async def _trim_logs(self) -> None:
        while True:
            await asyncio.sleep(self._timing.log_interval_s)
            for child in self.children:
                child.log.trim()

    async def _shut_down(self) -> None:
        """Frontends first: they need the workers to finish what they have begun."""
        for kind in (ProcessKind.FRONTEND, ProcessKind.WORKER):
            alive = [child for child in self.children if child.spec.kind is kind and child.pid is not None]
            if not alive or self._kill.is_set():
                continue
            self._tell(Stopping(tuple(child.spec.name for child in alive)))
            for child in alive:
                child.terminate()
            # Nothing is under way in a deployment that was never ready, and a process that loads does not listen.
            patience_s = self._timing.grace_s + (self._timing.drain_timeout_s if self._ready.is_set() else 0.0)
            await self._wait_until_ended(alive, patience_s)
            for child in alive:
                child.kill()

    async def _wait_until_ended(self, children: Iterable[ChildProcess], timeout_s: float) -> None:
        waits = {asyncio.ensure_future(child.wait()) for child in children}
        killed = asyncio.ensure_future(self._kill.wait())
        try:
            async with asyncio.timeout(timeout_s):
                while waits and not killed.done():
                    ended, _ = await asyncio.wait({*waits, killed}, return_when=asyncio.FIRST_COMPLETED)
                    waits -= ended
        except TimeoutError:
            pass
        finally:
            for task in (*waits, killed):
                task.cancel()

    async def _kill_all(self) -> None:
        alive = [child for child in self.children if child.pid is not None]
        for child in alive:
            child.kill()
        for child in alive:
            await child.wait()

    def _why_start_timed_out(self) -> str:
        said = [f"{child.spec.name}: {child.log.last_message() or 'nothing'}" for child in self.children]
        return f"not ready after {self._timing.start_timeout_s:.0f} s; last heard from " + "; ".join(said)


def _why_start_failed(child: ChildProcess, exit_code: int, last_words: str) -> str:
    if exit_code == 1 and last_words:  # its own sentence
        return last_words
    end = f"{child.spec.name} ended before it was ready, {exit_phrase(exit_code)}"
    return f"{end}: {last_words}" if last_words else f"{end}, and said nothing"


async def _wait_for(event: asyncio.Event, timeout_s: float) -> None:
    """Until the event is set, or the time is over."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass


def _first(group: BaseExceptionGroup[StartFailed]) -> StartFailed:
    """Several processes may fail for one reason; one sentence is enough."""
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found
