"""The private folder of one deployment, and how others on this machine find it.

    $XDG_RUNTIME_DIR/polyphase/NAME/   or, where there is none, /tmp/polyphase-UID/NAME/
        lock               held (flock) by the supervisor as long as it lives
        deployment.json    what runs there (DeploymentRecord)
        logs/ workers/ sockets/

A folder whose lock nobody holds is what a killed supervisor left behind; the next deployment of that name clears it away.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import msgspec

from polyphase.core.errors import ConfigurationError
from polyphase.runtime.paths import MAX_SOCKET_PATH_BYTES, ensure_private_folder

# Room for NAME and for the longest socket below it: /NAME(20)/sockets/prefill-255.req
_MAX_BASE_BYTES = MAX_SOCKET_PATH_BYTES - 20 - len("//sockets/prefill-255.req")
LOGS = "logs"
_CLAIM_TIMEOUT_S = 0.3  # whoever looks whether a deployment lives holds its lock for microseconds


class DeploymentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`deployment.json`."""

    name: str
    model: str  # as clients call it; several with commas between
    url: str
    pid: int  # of the supervisor
    run_folder: str
    worker_ids: list[str]
    started_unix_s: float
    further_urls: list[str] = []  # of frontends beside the first one; msgspec copies the default

    @property
    def urls(self) -> list[str]:
        return [self.url, *self.further_urls]


def base_folder(environment: Mapping[str, str]) -> Path:
    """Where the run folders of this user lie."""
    runtime_folder = environment.get("XDG_RUNTIME_DIR")
    if runtime_folder:
        candidate = Path(runtime_folder) / "polyphase"
        is_usable = candidate.is_absolute() and candidate.parent.is_dir() and os.access(candidate.parent, os.W_OK | os.X_OK)
        if is_usable and len(os.fsencode(candidate)) <= _MAX_BASE_BYTES:
            return candidate
    return Path(f"/tmp/polyphase-{os.getuid()}")


class RunFolder:
    """Held from `claim` to `release`; a context manager that releases and keeps nothing."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self.logs = path / LOGS
        self._lock_fd: int | None = lock_fd

    @classmethod
    def claim(cls, name: str, environment: Mapping[str, str]) -> Self:
        """Raises: ConfigurationError if a deployment of this name lives, or no private folder can be made."""
        base = base_folder(environment)
        if base.is_symlink():
            raise ConfigurationError(f"{base} is a symbolic link; remove it, or set XDG_RUNTIME_DIR to a private folder")
        ensure_private_folder(base)
        path = base / name
        deadline_s = time.monotonic() + _CLAIM_TIMEOUT_S
        while True:
            ensure_private_folder(path)
            try:
                lock_fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except FileNotFoundError:
                continue  # the one before has just cleared the folder away
            try:
                fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock_fd)
                if time.monotonic() > deadline_s:
                    raise ConfigurationError(_already_running(name, path)) from None
                time.sleep(0.02)
                continue
            if _is_same_file(lock_fd, path / "lock"):
                break
            os.close(lock_fd)
        folder = cls(path, lock_fd)
        folder._clear(keep={"lock"})
        folder.logs.mkdir(mode=0o700)
        return folder

    def publish(self, record: DeploymentRecord) -> None:
        """Let others find this deployment. Raises: ConfigurationError if the folder cannot be written to."""
        temporary = self.path / "deployment.new"
        try:
            temporary.write_bytes(msgspec.json.encode(record))
            temporary.rename(self.path / "deployment.json")
        except OSError as error:
            raise ConfigurationError(
                f"the run folder {self.path} cannot be written to: {error.strerror}; "
                "make room there, or set XDG_RUNTIME_DIR to another folder"
            ) from error

    def release(self, *, keep_logs: bool = False) -> None:
        """Remove the folder; with `keep_logs`, all but the logs. Idempotent."""
        if self._lock_fd is None:
            return
        self._clear(keep={LOGS} if keep_logs else set())
        if not keep_logs:
            with contextlib.suppress(OSError):  # the next deployment of this name is already moving in
                self.path.rmdir()
        os.close(self._lock_fd)
        self._lock_fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def _clear(self, keep: set[str]) -> None:
        for entry in self.path.iterdir():
            if entry.name in keep:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def living_deployments(environment: Mapping[str, str]) -> list[DeploymentRecord]:
    """Deployments of this user whose supervisor lives, by name."""
    base = base_folder(environment)
    found = []
    for path in sorted(base.glob("*/deployment.json")):
        if _is_locked(path.parent / "lock"):
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=DeploymentRecord))
            except (OSError, msgspec.DecodeError):
                continue  # it went away this moment, or is of another version
    return found


def find_deployment(name: str | None, environment: Mapping[str, str]) -> DeploymentRecord:
    """The one with this name; without a name, the only one.

    Raises: ConfigurationError, saying what runs and what to do.
    """
    living = living_deployments(environment)
    names = ", ".join(record.name for record in living)
    if not living:
        raise ConfigurationError("no deployment is running on this machine; start one with: polyphase serve demo")
    if name is None:
        if len(living) > 1:
            raise ConfigurationError(f"several deployments are running; choose one with --name: {names}")
        return living[0]
    for record in living:
        if record.name == name:
            return record
    raise ConfigurationError(f"no deployment named {name!r} is running; running: {names}")


def _already_running(name: str, path: Path) -> str:
    try:
        record = msgspec.json.decode((path / "deployment.json").read_bytes(), type=DeploymentRecord)
        what = f" at {record.url} (pid {record.pid})"
    except (OSError, msgspec.DecodeError):
        what = ""
    return (
        f"a deployment named {name!r} is running already{what}; "
        "stop it, give this one another --name, or add workers to that one with polyphase join"
    )


def _is_locked(lock: Path) -> bool:
    try:
        fd = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _is_same_file(fd: int, path: Path) -> bool:
    try:
        there = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return stat.S_ISREG(there.st_mode) and (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
