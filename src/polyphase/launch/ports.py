"""Whether a frontend could listen at an address, asked before anything slow is started."""

from __future__ import annotations

import errno
import socket

from polyphase.core.errors import ConfigurationError


def check_port(host: str, port: int) -> None:
    """Raises: ConfigurationError, saying what to do instead."""
    error = _try_to_listen(host, port)
    if error is None:
        return
    if error.errno == errno.EADDRINUSE:
        raise ConfigurationError(f"port {port} on {host} is in use; choose another one, for example --port {free_port(host)}")
    if error.errno == errno.EACCES:
        raise ConfigurationError(f"this user may not listen on port {port}; choose one from 1024 up, for example --port 8000")
    raise ConfigurationError(f"cannot listen on {host}: {error.strerror or error}; choose an address of this machine, such as 127.0.0.1")


def is_port_free(host: str, port: int) -> bool:
    return _try_to_listen(host, port) is None


def free_port(host: str) -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _try_to_listen(host: str, port: int) -> OSError | None:
    try:
        with socket.socket(_family(host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do, for connections of a server just ended
            probe.bind((host, port))
            probe.listen(1)
    except OSError as error:
        return error
    return None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
