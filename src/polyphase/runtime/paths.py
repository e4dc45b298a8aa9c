"""Where things lie in a run folder, and what a worker may be called.

RUN/                          0700, one per deployment on this machine
  workers/<worker id>.json    registry (registry.py)
  workers/<worker id>.role    the role that it was given last, if any
  sockets/<worker id>.req     request channel, ZeroMQ ROUTER
  sockets/<worker id>.ev      event stream, ZeroMQ PUB
  sockets/<worker id>.kv      hands out the block pool
  logs/                       written by the supervisor
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from polyphase.core.errors import ConfigurationError

MAX_SOCKET_PATH_BYTES = 107  # Source: sockaddr_un.sun_path of Linux holds 108 with the closing zero
_WORKER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,47}")


def check_worker_id(worker_id: str) -> None:
    """Raises: ConfigurationError unless `worker_id` can be the name of a file and of a metric's label."""
    if not _WORKER_ID.fullmatch(worker_id):
        raise ConfigurationError(
            f"worker id {worker_id!r} is not usable: up to 48 letters, digits, '-' and '_', beginning with a letter or digit"
        )


def ensure_private_folder(folder: Path) -> None:
    """Create `folder` with mode 0700 if it is missing.

    Raises: ConfigurationError if it cannot be created, is not a folder, or others than this user may enter it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"the folder {folder} cannot be created: {error.strerror}") from error
    check_private_folder(folder)


def check_private_folder(folder: Path) -> None:
    """Raises: ConfigurationError as `ensure_private_folder`; a missing folder is an error here."""
    try:
        found = folder.stat()
    except OSError as error:
        raise ConfigurationError(f"the folder {folder} cannot be used: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigurationError(f"{folder} is not a folder")
    if found.st_uid != os.getuid():
        raise ConfigurationError(f"the folder {folder} belongs to user {found.st_uid}, but this process runs as user {os.getuid()}")
    if found.st_mode & 0o077:
        raise ConfigurationError(
            f"the folder {folder} is open to other users (mode {found.st_mode & 0o777:04o}); close it with: chmod 700 {folder}"
        )


@dataclass(frozen=True, slots=True)
class WorkerPaths:
    """The sockets of one worker."""

    request_socket: Path
    event_socket: Path
    pool_socket: Path

    @classmethod
    def of(cls, run_folder: Path, worker_id: str) -> WorkerPaths:
        """Raises: ConfigurationError if the worker id is not usable or the run folder's path is too long for a socket."""
        check_worker_id(worker_id)
        folder = run_folder.absolute() / "sockets"
        longest = folder / f"{worker_id}.req"
        excess = len(os.fsencode(longest)) - MAX_SOCKET_PATH_BYTES
        if excess > 0:
            raise ConfigurationError(f"the run folder {run_folder} is too long for sockets by {excess} bytes; choose a shorter one")
        return cls(longest, folder / f"{worker_id}.ev", folder / f"{worker_id}.kv")

    @property
    def request_endpoint(self) -> str:
        return f"ipc://{self.request_socket}"

    @property
    def event_endpoint(self) -> str:
        return f"ipc://{self.event_socket}"

    def remove(self) -> None:
        """Delete the sockets; those already gone are fine."""
        for path in (self.request_socket, self.event_socket, self.pool_socket):
            path.unlink(missing_ok=True)
