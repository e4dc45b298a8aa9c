"""What is done to a living cluster. Each kind is one function that does one fault and says what it did; None: nothing to do it to.

A fault that lasts (a stopped process, a full disk, an order that waits for its moment) is ended by itself after its time, or by
`Chaos.heal`; an order counts when it was carried out. At least one worker is left that is neither dead nor stopped, nor about to be,
because what happens to a request without any worker is another question.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass

import httpx

from polyphase.core.errors import ConfigurationError, WorkerLost
from polyphase.runtime import switch_role
from polyphase.testing import Deployment
from polyphase.testing.connections import CannotCut, cut_connections
from polyphase.testing.tripwires import Action, Trip, Tripwires
from polyphase.testing.wire_faults import KINDS, WireFaults
from polyphase.wire.cards import Role, WorkerEntry
from tests.chaos.disks import hold_filler, hold_limit
from tests.chaos.outages import Outages
from tests.chaos.pools import find_pool, renew_for_a_while

ORDER_PATIENCE_S = 4.0  # for its moment to come
ANYBODYS_MOMENTS = ("accepting", "switching", "switched", "finishing")
PREFILL_MOMENTS = ("part-told", "offering")
DECODE_MOMENTS = ("part-heard", "opening", "reading", "read", "handing-back")
Fault = Callable[["Chaos"], Awaitable[str | None]]


@dataclass(frozen=True)
class Means:
    """With which faults are done."""

    tripwires: Tripwires
    wire_faults: WireFaults | None  # None: blocks do not travel over tcp
    has_small_disk: bool


class Chaos:
    """Does faults to one deployment until told to stop."""

    def __init__(self, served: Deployment, means: Means, seed: int, weights: dict[str, float], mean_interval_s: float) -> None:
        self.served = served
        self.means = means
        self.outages = Outages()
        self.rng = random.Random(seed)
        self.stopped: dict[int, asyncio.Task[None]] = {}  # by pid, workers and frontends
        self.aimed_at: set[int] = set()  # pids with an order to kill or stop themselves
        self.killed: set[int] = set()  # pids; the registry shows a dying process until its memory is freed
        self.lasting: dict[str, asyncio.Task[None]] = {}  # one of each kind
        self.counts: Counter[str] = Counter()
        self.moments: Counter[str] = Counter()
        self.unavailable: set[str] = set()
        self.log: list[str] = []
        self._weights = weights
        self._mean_interval_s = mean_interval_s
        self._began_s = time.monotonic()

    @property
    def count(self) -> int:
        return sum(self.counts.values())

    def workers(self) -> list[WorkerEntry]:
        """Living and not stopped, nor soon to be, in an order that depends on nothing but their names."""
        spoken_for = self.stopped.keys() | self.aimed_at | self.killed
        return [entry for _, entry in sorted(self.served.workers().items()) if entry.pid not in spoken_for]

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
                self.note(name, did)

    def note(self, name: str, did: str) -> None:
        self.counts[name] += 1
        self.log.append(f"{time.monotonic() - self._began_s:7.2f} s  {name}: {did}")

    def begin(self, name: str, fault: Coroutine[None, None, None]) -> None:
        """One that lasts."""
        task = self.lasting[name] = asyncio.create_task(fault, name=name)
        task.add_done_callback(lambda _: self.lasting.pop(name, None))

    def stop_for(self, pid: int, seconds: float) -> bool:
        """Returns: whether there is such a process."""
        try:
            os.kill(pid, signal.SIGSTOP)
        except ProcessLookupError:
            return False
        self.stopped[pid] = asyncio.create_task(self._hold_stopped(pid, seconds))
        return True

    async def _hold_stopped(self, pid: int, seconds: float) -> None:
        try:
            await asyncio.sleep(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            del self.stopped[pid]

    async def heal(self) -> None:
        """End what lasts, and wait until killed frontends are back."""
        await asyncio.sleep(0)  # what has just begun must get as far as its `finally`
        while tasks := [*self.lasting.values(), *self.stopped.values()]:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for url in self.served.urls:
            if self.outages.is_out(url):
                await self.wait_for_frontend(url)

    async def wait_for_frontend(self, url: str) -> None:
        """Until it serves again; the outage is over then. Not bounded here: whoever asks has a bound."""
        async with httpx.AsyncClient(base_url=url, timeout=10) as client:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get("/health")).status_code == 200:
                        break
                await asyncio.sleep(0.1)
        self.outages.end(url)


# Processes


async def kill(chaos: Chaos) -> str | None:
    workers = chaos.workers()
    if len(workers) < 2:
        return None
    victim = chaos.rng.choice(workers)
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim.pid, signal.SIGKILL)
    chaos.killed.add(victim.pid)
    return victim.worker_id


async def stop(chaos: Chaos) -> str | None:
    workers = chaos.workers()
    if len(workers) < 2 or chaos.stopped:
        return None
    victim, seconds = chaos.rng.choice(workers), chaos.rng.choice([0.2, 1.0, 3.0, 6.0, 12.0])
    return f"{victim.worker_id} for {seconds} s" if chaos.stop_for(victim.pid, seconds) else None


async def kill_frontend(chaos: Chaos) -> str | None:
    """All of its clients' connections break with it; those of another frontend must not notice."""
    urls = [url for url in chaos.served.urls if not chaos.outages.is_out(url)]
    if len(urls) < 2 or "kill-frontend" in chaos.lasting:
        return None
    url = chaos.rng.choice(urls)
    pid = chaos.served.frontend_pids().get(url)
    if pid is None:
        return None
    chaos.outages.begin(url)
    os.kill(pid, signal.SIGKILL)
    chaos.begin("kill-frontend", chaos.wait_for_frontend(url))
    return url


async def stop_frontend(chaos: Chaos) -> str | None:
    pids = [pid for _, pid in sorted(chaos.served.frontend_pids().items())]
    if not pids or any(pid in chaos.stopped for pid in pids):
        return None
    pid, seconds = chaos.rng.choice(pids), chaos.rng.choice([0.2, 1.0, 3.0, 5.0])
    return f"{pid} for {seconds} s" if chaos.stop_for(pid, seconds) else None


async def moment(chaos: Chaos) -> str | None:
    """A worker is killed, or stops, just when it does something: told beforehand, and counted when it has happened."""
    workers = chaos.workers()
    if len(workers) < 2 or "moment" in chaos.lasting or chaos.stopped:
        return None
    victim = chaos.rng.choice(workers)
    when = chaos.rng.choice([*ANYBODYS_MOMENTS, *(PREFILL_MOMENTS if victim.role is Role.PREFILL else DECODE_MOMENTS)])
    action: Action = chaos.rng.choice(["kill", "kill", "stop"])
    seconds = chaos.rng.choice([0.2, 1.0, 3.0, 6.0])
    another = Role.DECODE if victim.role is Role.PREFILL else Role.PREFILL
    chaos.begin("moment", _wait_for_moment(chaos, victim, Trip(action, when, victim.pid), seconds, another))
    return None


async def _wait_for_moment(chaos: Chaos, victim: WorkerEntry, trip: Trip, seconds: float, another: Role) -> None:
    wires, before = chaos.means.tripwires, len(chaos.means.tripwires.carried_out())
    chaos.aimed_at.add(victim.pid)
    try:
        wires.order(trip.action, trip.moment, trip.pid)
        if trip.moment in ("switching", "switched", "handing-back"):  # nobody else may come to wish for it in time
            await _switch(chaos, victim.worker_id, another, is_forced=False)
        await _until(lambda: not wires.pending())
    finally:
        wires.withdraw()
        if len(wires.carried_out()) > before:
            chaos.note("moment", f"{trip.action} {victim.worker_id} at {trip.moment}")
            chaos.moments[f"{trip.action} {trip.moment}"] += 1
            if trip.action == "stop":
                chaos.stop_for(victim.pid, seconds)
            else:
                chaos.killed.add(victim.pid)
        chaos.aimed_at.discard(victim.pid)


async def _until(is_done: Callable[[], bool]) -> None:
    """Or until there is no patience left."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ORDER_PATIENCE_S):
            while not is_done():  # noqa: ASYNC110  other processes do it
                await asyncio.sleep(0.02)


# Roles and connections


async def role(chaos: Chaos) -> str | None:
    workers = chaos.workers()
    if not workers:
        return None
    victim, wanted = chaos.rng.choice(workers), chaos.rng.choice(list(Role))
    has_changed = await _switch(chaos, victim.worker_id, wanted, is_forced=chaos.rng.random() < 0.1)
    return f"{victim.worker_id} from {victim.role} to {wanted}" if has_changed and victim.role is not wanted else None


async def _switch(chaos: Chaos, worker_id: str, wanted: Role, *, is_forced: bool) -> bool:
    """Returns: whether it was done and said so."""
    try:
        async for _ in switch_role(chaos.served.run_folder, worker_id, wanted, is_forced=is_forced, patience_s=0):
            pass
    except (ConfigurationError, WorkerLost):
        return False
    return True


async def cut(chaos: Chaos) -> str | None:
    """Requests, events, or the transfer agent's connections."""
    workers = chaos.workers()
    if not workers:
        return None
    victim, what = chaos.rng.choice(workers), chaos.rng.choice(["req", "req", "ev", "kv"])
    path = chaos.served.run_folder / "sockets" / f"{victim.worker_id}.{what}"
    try:
        count = cut_connections(victim.pid, path)
    except ProcessLookupError:
        return None
    return f"{count} of {path.name}" if count else None


# Disks and blocks


async def fill_disk(chaos: Chaos) -> str | None:
    """The run folder's disk, or, where that cannot be done, a worker may write to no file any more."""
    if "full-disk" in chaos.lasting:
        return None
    seconds = chaos.rng.uniform(0.5, 3)
    if chaos.means.has_small_disk:
        filler = chaos.served.home / "filler"
        chaos.begin("full-disk", hold_filler(filler, seconds))
        return f"{filler} for {seconds:.1f} s"
    workers = chaos.workers()
    if not workers:
        return None
    victim = chaos.rng.choice(workers)
    chaos.begin("full-disk", hold_limit(victim.pid, seconds))
    return f"{victim.worker_id} may write nothing for {seconds:.1f} s"


async def reuse(chaos: Chaos) -> str | None:
    """For a second, all of a worker's blocks look to readers as if they were given to somebody else while they are read."""
    workers = chaos.workers()
    if not workers or "reuse" in chaos.lasting:
        return None
    victim = chaos.rng.choice(workers)
    try:
        pool = find_pool(victim.pid)
    except (ProcessLookupError, FileNotFoundError):
        return None
    chaos.begin("reuse", asyncio.to_thread(renew_for_a_while, pool))
    return victim.worker_id


async def damage(chaos: Chaos) -> str | None:
    """The next blocks that anybody sends over tcp arrive changed, exchanged, or in part; counted when it has happened."""
    if chaos.means.wire_faults is not None and "damage" not in chaos.lasting:
        chaos.begin("damage", _wait_for_damage(chaos, chaos.means.wire_faults, [chaos.rng.choice(KINDS) for _ in range(2)]))
    return None


async def _wait_for_damage(chaos: Chaos, faults: WireFaults, kinds: list[str]) -> None:
    before = len(faults.carried_out())
    try:
        for kind in kinds:
            faults.order(kind)  # type: ignore[arg-type]
        await _until(lambda: not faults.pending())
    finally:
        faults.withdraw()
        for kind in faults.carried_out()[before:]:
            chaos.note("damage", kind)


FAULTS: dict[str, Fault] = {
    "kill": kill,
    "stop": stop,
    "kill-frontend": kill_frontend,
    "stop-frontend": stop_frontend,
    "moment": moment,
    "role": role,
    "cut": cut,
    "full-disk": fill_disk,
    "reuse": reuse,
    "damage": damage,
}
WEIGHTS = {
    "kill": 0.06,
    "stop": 0.08,
    "kill-frontend": 0.05,
    "stop-frontend": 0.03,
    "moment": 0.4,
    "role": 0.28,
    "cut": 0.12,
    "full-disk": 0.04,
    "reuse": 0.07,
}
WEIGHTS_TCP = {name: weight for name, weight in WEIGHTS.items() if name != "reuse"} | {"damage": 0.2}
