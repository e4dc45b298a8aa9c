"""Where an agent listens, and how it calls others: Unix sockets on one host, TCP between hosts."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from polyphase.core.clock import Clock
from polyphase.core.errors import ConfigurationError, PeerLost, PolyphaseError, TransferTimeout
from polyphase.runtime.paths import MAX_SOCKET_PATH_BYTES
from polyphase.transfer.greeting import check_user
from polyphase.transfer.wire import Wire
from polyphase.wire.transfer import AgentCard

log = logging.getLogger(__name__)

BACKLOG = 128
KEEPALIVE_S = 10  # a host that vanished without a word is noticed after about three times this


def host_id() -> str:
    """Equal for processes of one running system. Source: Linux's boot id; elsewhere the host's name."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def why_not_by_unix(mine: AgentCard, theirs: AgentCard) -> str | None:
    """Why the Unix socket of another agent is not in reach; None if it is."""
    if theirs.host_id != mine.host_id:
        return f"agent {theirs.agent_id} runs on another host"
    if theirs.user_id != mine.user_id:
        return f"agent {theirs.agent_id} belongs to user {theirs.user_id}, this one to {mine.user_id}"
    if not theirs.unix_path or not os.path.exists(theirs.unix_path):
        return f"the socket {theirs.unix_path!r} of agent {theirs.agent_id} cannot be seen here (gone, or in another container)"
    return None


class Doors:
    """The listening sockets of one agent. Owner: the agent, by `close`."""

    def __init__(self, unix_path: str | None, tcp_address: str | None) -> None:
        """Listen at both.

        Args:
            unix_path: None for one in a private folder of its own, removed at the end.
            tcp_address: "host:port", port 0 for any; None to be out of reach for other hosts.

        Raises: ConfigurationError.
        """
        self._folder: str | None = None
        self.listeners: list[socket.socket] = []
        self.tcp_address = ""
        try:
            if unix_path is None:
                self._folder = tempfile.mkdtemp(prefix="polyphase-transfer-")
                unix_path = str(Path(self._folder) / "agent")
            self.listeners.append(_listen_unix(Path(unix_path)))
            self.unix_path = unix_path
            if tcp_address is not None:
                listener = _listen_tcp(tcp_address)
                self.listeners.append(listener)
                host, port = listener.getsockname()[:2]
                self.tcp_address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        except BaseException:
            self.close()
            raise

    def accept(self, listener: socket.socket, clock: Clock, welcome: Callable[[Wire], None]) -> None:
        """Take one caller, if there still is one; `welcome` must be quick."""
        try:
            connection, address = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # out of descriptors, most likely: the caller tries again
            log.warning("a caller could not be let in: %s", error)
            return
        try:
            check_user(connection)
            _tune(connection)
            welcome(Wire(connection, clock, f"the caller from {address}" if address else "a caller on this host"))
        except (OSError, PolyphaseError) as error:
            connection.close()
            log.warning("a caller was sent away: %s", error)

    def close(self) -> None:
        """Idempotent."""
        for listener in self.listeners:
            if listener.family == socket.AF_UNIX:
                with contextlib.suppress(OSError):
                    Path(listener.getsockname()).unlink(missing_ok=True)
            listener.close()
        self.listeners.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _listen_unix(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise ConfigurationError(f"the socket path '{path}' has more than {MAX_SOCKET_PATH_BYTES} bytes; choose a shorter one")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)  # of a dead process; nobody else may use the path
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"the transfer agent cannot listen at {path}: {error.strerror}") from error
    return listener


def _listen_tcp(address: str) -> socket.socket:
    host, port = split_address(address)
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=BACKLOG)
    except OSError as error:
        raise ConfigurationError(f"the transfer agent cannot listen at {address}: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener


def split_address(address: str) -> tuple[str, int]:
    """Raises: ConfigurationError if it is not "host:port"."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigurationError(f"{address!r} is no address; it must be host:port, for example 10.0.0.5:0")
    return host.strip("[]"), int(port)


def call(theirs: AgentCard, *, is_local: bool, clock: Clock, deadline_ns: int) -> Wire:
    """A new connection to another agent, by its Unix socket or by TCP. Raises: PeerLost, TransferTimeout."""
    address = theirs.unix_path if is_local else theirs.tcp_address
    peer = f"agent {theirs.agent_id} at {address or 'no address'}"
    left_s = (deadline_ns - clock.now_ns()) / 1e9
    if left_s <= 0:
        raise TransferTimeout(f"there was no time left to call {peer}")
    sock = socket.socket(socket.AF_UNIX) if is_local else None
    try:
        if sock is not None:
            sock.settimeout(left_s)
            sock.connect(address)
        else:
            host, port = split_address(address)
            sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            sock.settimeout(left_s)
            sock.connect((host, port))
        _tune(sock)
    except TimeoutError:
        assert sock is not None
        sock.close()
        raise TransferTimeout(f"{peer} did not answer the call in time") from None
    except (OSError, ConfigurationError) as error:
        if sock is not None:
            sock.close()
        raise PeerLost(f"{peer} cannot be reached: {error}") from error
    wire = Wire(sock, clock, peer)
    wire.deadline_ns = deadline_ns
    return wire


def _tune(sock: socket.socket) -> None:
    if sock.family == socket.AF_UNIX:
        return
    # Buffers are left to the kernel, which finds their size by itself: fixed ones of 1 and 4 MiB cost a tenth more CPU time on loopback.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", KEEPALIVE_S), ("TCP_KEEPINTVL", KEEPALIVE_S), ("TCP_KEEPCNT", 2)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
