"""Who is there: a folder of leases, one JSON file per worker, in the private run folder of one machine.

The owner keeps its file open and locked (flock) and renews its time every second. So a reader knows at once that an owner died, by
whatever cause, because the kernel drops the lock; and within `ttl_s` that an owner stands still. A file is only ever replaced by a complete
one. Its time is set to CLOCK_MONOTONIC, which all processes of the machine share and nobody sets, so that a changed clock or a
laptop's sleep kills no worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from polyphase.core.errors import ConfigurationError
from polyphase.runtime.folder_watch import folder_changes
from polyphase.runtime.paths import check_private_folder, check_worker_id, ensure_private_folder
from polyphase.wire.cards import Role, WorkerEntry

log = logging.getLogger(__name__)

RENEWAL_INTERVAL_S = 1.0
TTL_S = 10.0
CLAIM_TIMEOUT_S = 1.0  # a reader holds the lock for microseconds when it looks whether the owner is alive
MAX_ENTRY_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Joined:
    """A worker is there, in a life of its own."""

    entry: WorkerEntry


@dataclass(frozen=True, slots=True)
class Updated:
    """The same life of a worker changed its role or began to drain."""

    entry: WorkerEntry


@dataclass(frozen=True, slots=True)
class Left:
    """This life of the worker is over, or it stands still; in the latter case it may join again with the same epoch."""

    worker_id: str
    epoch: int


RegistryChange = Joined | Updated | Left


class Lease:
    """A worker's hold on its name, and its entry. While `renew` runs, the entry counts as living. A context manager: leaving withdraws."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd
        self._is_withdrawn = False

    def publish(self, entry: WorkerEntry) -> None:
        """Make the entry visible, for the first time or in place of the earlier one."""
        if self._is_withdrawn:
            return
        temporary = self._path.with_suffix(".new")
        temporary.unlink(missing_ok=True)  # of an earlier life that died in between
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(fd, msgspec.json.encode(entry))
            _set_time(fd)
            os.rename(temporary, self._path)
        except BaseException:
            os.close(fd)
            temporary.unlink(missing_ok=True)
            raise
        os.close(self._fd)
        self._fd = fd

    update = publish

    def remember_role(self, role: Role) -> None:
        """For the next life of this worker in this run folder: a role that was given to it survives a crash. Raises: OSError."""
        path = self._path.with_suffix(".role")
        temporary = path.with_suffix(".role.new")
        temporary.write_text(role.value)
        temporary.rename(path)

    def remembered_role(self) -> Role | None:
        """None if it was never given another one."""
        try:
            return Role(self._path.with_suffix(".role").read_text())
        except (OSError, ValueError):
            return None

    async def renew(self) -> None:
        """Keep the entry alive until cancelled; runs as a task of the owner, so that an owner whose loop stands still counts as dead."""
        while not self._is_withdrawn:
            _set_time(self._fd)
            await asyncio.sleep(RENEWAL_INTERVAL_S)

    def withdraw(self) -> None:
        """Leave the registry and give the name free. Idempotent."""
        if self._is_withdrawn:
            return
        self._is_withdrawn = True
        self._path.unlink(missing_ok=True)
        os.close(self._fd)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.withdraw()


class Registry:
    """The registry of one run folder, for owners of entries and for those who read them."""

    def __init__(self, run_folder: Path, ttl_s: float = TTL_S) -> None:
        self.folder = run_folder / "workers"
        self._run_folder = run_folder
        self._ttl_s = ttl_s
        self._foreign: set[str] = set()  # files that were complained about

    def claim(self, worker_id: str) -> Lease:
        """Take a name before there is anything to announce, so that a second process of that name ends before it loads a model.

        Raises: ConfigurationError if the name is taken or unusable, or the folder is not private.
        Owner: the caller, by `withdraw`; the process's death withdraws it as well.
        """
        check_worker_id(worker_id)
        ensure_private_folder(self._run_folder)
        ensure_private_folder(self.folder)
        path = self.folder / f"{worker_id}.json"
        deadline_s = time.monotonic() + CLAIM_TIMEOUT_S
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_same_file(fd, path):
                    os.ftruncate(fd, 0)  # what a dead owner left
                    return Lease(path, fd)
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    os.close(fd)
                    raise ConfigurationError(
                        f"a worker with the id {worker_id!r} runs already in {self._run_folder}; give this one another --worker-id"
                    ) from None
                time.sleep(0.02)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def announce(self, entry: WorkerEntry) -> Lease:
        """Claim the entry's name and publish the entry; run `Lease.renew` as a task to keep it.

        Raises: ConfigurationError as `claim`.
        """
        lease = self.claim(entry.worker_id)
        try:
            lease.publish(entry)
        except BaseException:
            lease.withdraw()
            raise
        return lease

    def entries(self) -> list[WorkerEntry]:
        """The living workers, by name. Files of dead ones are removed; others that are no entries are left and named once in the log."""
        return list(self._living())

    def _living(self) -> Iterator[WorkerEntry]:
        try:
            names = sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return
        check_private_folder(self.folder)
        for name in names:
            if name.endswith(".json"):
                entry = self._read(self.folder / name)
                if entry is not None:
                    yield entry

    def _read(self, path: Path) -> WorkerEntry | None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENXIO):
                self._complain(path, error.strerror or str(error))
            return None
        try:
            if _is_unlocked(fd):
                if _is_same_file(fd, path):
                    path.unlink(missing_ok=True)
                return None
            age_s = (time.monotonic_ns() - os.fstat(fd).st_mtime_ns) / 1e9
            data = os.read(fd, MAX_ENTRY_BYTES)
        except OSError as error:
            self._complain(path, error.strerror or str(error))
            return None
        finally:
            os.close(fd)
        if not data or age_s > self._ttl_s:  # claimed and still loading, or standing still
            return None
        try:
            entry = msgspec.json.decode(data, type=WorkerEntry)
        except msgspec.DecodeError as error:
            self._complain(path, str(error))
            return None
        if entry.worker_id != path.stem:
            self._complain(path, f"it speaks of worker {entry.worker_id!r}")
            return None
        return entry

    def _complain(self, path: Path, reason: str) -> None:
        if path.name not in self._foreign:
            self._foreign.add(path.name)
            log.warning("%s is not a registry entry and is ignored: %s", path, reason)

    async def watch(self) -> AsyncGenerator[RegistryChange, None]:
        """All who are there, as `Joined`; then every change as it happens. A restarted worker gives `Left` and then `Joined`.

        Raises: ConfigurationError if the folder is not private.
        Cancel: the watch on the folder is removed.
        """
        ensure_private_folder(self._run_folder)
        ensure_private_folder(self.folder)
        known: dict[str, WorkerEntry] = {}
        async with contextlib.aclosing(folder_changes(self.folder, check_interval_s=self._ttl_s / 4)) as changes:
            async for _ in changes:
                found = {entry.worker_id: entry for entry in self._living()}
                for change in difference(known, found):
                    yield change
                known = found


def difference(known: dict[str, WorkerEntry], found: dict[str, WorkerEntry]) -> list[RegistryChange]:
    """What happened between two looks at the registry; departures first."""
    changes: list[RegistryChange] = []
    for worker_id, old in known.items():
        new = found.get(worker_id)
        if new is None or new.epoch != old.epoch:
            changes.append(Left(worker_id, old.epoch))
    for worker_id, new in found.items():
        before = known.get(worker_id)
        if before is None or before.epoch != new.epoch:
            changes.append(Joined(new))
        elif before != new:
            changes.append(Updated(new))
    return changes


def _set_time(fd: int) -> None:
    now_ns = time.monotonic_ns()
    os.utime(fd, ns=(now_ns, now_ns))


def _is_same_file(fd: int, path: Path) -> bool:
    """Whether `path` still names the open file; between opening and locking it may have been removed or replaced."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _is_unlocked(fd: int) -> bool:
    """Whether nobody holds the file; if so, this descriptor now shares the lock, so that no owner appears before it is closed."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
