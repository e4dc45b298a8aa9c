"""What is done to a living cluster. Each kind is one function that does one fault and says what it did; None: nothing to do it to.

A fault that lasts (a stopped process, a full disk) is ended by itself after its time, or by `Chaos.heal`. At least one worker is left that
is neither dead nor stopped, because what happens to a request without any worker is another question.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
import subprocess
import time
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from polyphase.core.errors import ConfigurationError, TransferError, WorkerLost
from polyphase.runtime import switch_role
from polyphase.testing import Deployment
from polyphase.testing.connections import CannotCut, cut_connections
from polyphase.transfer.layout import PAGE_BYTES, PoolLayout
from polyphase.wire.cards import Role, WorkerEntry

DISK_BYTES = 64 << 20
Fault = Callable[["Chaos"], Awaitable[str | None]]


def mount_small_disk(folder: Path) -> bool:
    """A disk of its own for the deployment, small enough to be filled; needs root. Returns: whether there is one."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


class Chaos:
    """Does faults to one deployment until told to stop."""

    def __init__(self, served: Deployment, seed: int, weights: dict[str, float], mean_interval_s: float, *, has_small_disk: bool) -> None:
        self.served = served
        self.rng = random.Random(seed)
        self.has_small_disk = has_small_disk
        self.stopped: dict[int, asyncio.Task[None]] = {}  # by pid
        self.filled: asyncio.Task[None] | None = None
        self.reusing: asyncio.Task[None] | None = None
        self.counts: Counter[str] = Counter()
        self.unavailable: set[str] = set()
        self.log: list[str] = []
        self._weights = weights
        self._mean_interval_s = mean_interval_s
        self._began_s = asyncio.get_running_loop().time()

    @property
    def count(self) -> int:
        return sum(self.counts.values())

    def workers(self) -> list[WorkerEntry]:
        """Living and not stopped, in an order that depends on nothing but their names."""
        return [entry for _, entry in sorted(self.served.workers().items()) if entry.pid not in self.stopped]

    async def run(self, is_enough: Callable[[], bool]) -> None:
        while not is_enough():
            await asyncio.sleep(self.rng.expovariate(1 / self._mean_interval_s))
            names = [name for name in self._weights if name not in self.unavailable]
            [name] = self.rng.choices(names, [self._weights[name] for name in names])
            try:
                did = await FAULTS[name](self)
            except CannotCut as error:
                self.unavailable.add(name)
                did = None
                self.log.append(f"{name} is not possible here: {error.message}")
            if did is not None:
                self.counts[name] += 1
                self.log.append(f"{asyncio.get_running_loop().time() - self._began_s:7.2f} s  {name}: {did}")

    async def heal(self) -> None:
        """End what lasts."""
        await asyncio.sleep(0)  # what has just begun must get as far as its `finally`
        lasting = [*self.stopped.values(), *(task for task in (self.filled, self.reusing) if task is not None)]
        for task in lasting:
            task.cancel()
        await asyncio.gather(*lasting, return_exceptions=True)


async def kill(chaos: Chaos) -> str | None:
    workers = chaos.workers()
    if len(workers) < 2:
        return None
    victim = chaos.rng.choice(workers)
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim.pid, signal.SIGKILL)
    return victim.worker_id


async def stop(chaos: Chaos) -> str | None:
    workers = chaos.workers()
    if len(workers) < 2 or chaos.stopped:
        return None
    victim, seconds = chaos.rng.choice(workers), chaos.rng.choice([0.2, 1.0, 3.0, 6.0, 12.0])

    async def hold() -> None:
        try:
            await asyncio.sleep(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGCONT)
            del chaos.stopped[victim.pid]

    try:
        os.kill(victim.pid, signal.SIGSTOP)
    except ProcessLookupError:
        return None
    chaos.stopped[victim.pid] = asyncio.create_task(hold())
    return f"{victim.worker_id} for {seconds} s"


async def role(chaos: Chaos) -> str | None:
    workers = chaos.workers()
    if not workers:
        return None
    victim, wanted = chaos.rng.choice(workers), chaos.rng.choice(list(Role))
    is_forced = chaos.rng.random() < 0.1
    try:
        async for _ in switch_role(chaos.served.run_folder, victim.worker_id, wanted, is_forced=is_forced, patience_s=0):
            pass
    except (ConfigurationError, WorkerLost):
        return None
    return f"{victim.worker_id} from {victim.role} to {wanted}" if victim.role is not wanted else None


async def cut(chaos: Chaos) -> str | None:
    workers = chaos.workers()
    if not workers:
        return None
    victim, what = chaos.rng.choice(workers), chaos.rng.choice(["req", "req", "ev"])
    path = chaos.served.run_folder / "sockets" / f"{victim.worker_id}.{what}"
    try:
        count = cut_connections(victim.pid, path)
    except ProcessLookupError:
        return None
    return f"{count} of {path.name}" if count else None


async def fill_disk(chaos: Chaos) -> str | None:
    """The run folder's disk, or, where that cannot be done, a worker may write to no file any more."""
    if chaos.filled is not None:
        return None
    seconds = chaos.rng.uniform(0.5, 3)
    if chaos.has_small_disk:
        filler = chaos.served.home / "filler"
        chaos.filled = asyncio.create_task(_hold_filler(chaos, filler, seconds))
        return f"{filler} for {seconds:.1f} s"
    workers = chaos.workers()
    if not workers:
        return None
    victim = chaos.rng.choice(workers)
    chaos.filled = asyncio.create_task(_hold_limit(chaos, victim.pid, seconds))
    return f"{victim.worker_id} may write nothing for {seconds:.1f} s"


async def _hold_filler(chaos: Chaos, filler: Path, seconds: float) -> None:
    try:
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):  # noqa: ASYNC230  it is soon full
            while True:
                file.write(bytes(1 << 16))
        await asyncio.sleep(seconds)
    finally:
        os.unlink(filler)
        chaos.filled = None


async def _hold_limit(chaos: Chaos, pid: int, seconds: float) -> None:
    hard = resource.RLIM_INFINITY
    try:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
        await asyncio.sleep(seconds)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
        chaos.filled = None


async def reuse(chaos: Chaos) -> str | None:
    """For a second, all of a worker's blocks look to readers as if they were given to somebody else while they are read."""
    workers = chaos.workers()
    if not workers or chaos.reusing is not None:
        return None
    victim = chaos.rng.choice(workers)
    try:
        address, block_count = _find_pool(victim.pid)
    except (ProcessLookupError, FileNotFoundError):
        return None
    chaos.reusing = asyncio.create_task(_hold_reuse(chaos, victim.pid, address, block_count))
    return victim.worker_id


def _find_pool(pid: int) -> tuple[int, int]:
    """Address of a worker's KV pool in its own memory, and its block count. Raises: CannotCut; FileNotFoundError if it has none."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "memfd:" not in line or "w" not in line.split()[1]:
            continue
        address = int(line.split("-")[0], 16)
        try:
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory, contextlib.suppress(TransferError, OSError):
                memory.seek(address)
                return address, PoolLayout.unpack(memory.read(PAGE_BYTES)).block_count
        except PermissionError as error:
            raise CannotCut(f"the memory of process {pid} cannot be opened: {error}") from error
    raise FileNotFoundError(f"process {pid} has no block pool")


async def _hold_reuse(chaos: Chaos, pid: int, address: int, block_count: int) -> None:
    try:
        await asyncio.to_thread(_renew_all, pid, address + PAGE_BYTES, 8 * block_count)
    finally:
        chaos.reusing = None


def _renew_all(pid: int, address: int, size: int) -> None:
    """As fast as it goes. The pool is sealed against other processes: so through the worker's own memory."""
    until_s = time.monotonic() + 1
    with contextlib.suppress(OSError):  # it died meanwhile
        while time.monotonic() < until_s:
            with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
                memory.seek(address)
                generations = array("Q", memory.read(size))
                memory.seek(address)
                memory.write(array("Q", (one + 1 for one in generations)).tobytes())
            time.sleep(0.001)


# A further kind, such as blocks corrupted on their way between hosts, is one more function here.
FAULTS: dict[str, Fault] = {"kill": kill, "stop": stop, "role": role, "cut": cut, "full-disk": fill_disk, "reuse": reuse}
WEIGHTS = {"kill": 0.1, "stop": 0.14, "role": 0.46, "cut": 0.16, "full-disk": 0.06, "reuse": 0.08}
