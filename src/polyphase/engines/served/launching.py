"""Starts an engine's server and waits until it answers, or waits for one that somebody else has started."""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from polyphase.core.errors import ConfigurationError, ModelLoadError
from polyphase.engines.served.process import ServerProcess, without_secrets

log = logging.getLogger(__name__)

ATTACH_TIMEOUT_S = 60.0
_UNKNOWN = re.compile(r"unrecognized arguments: (.+)")  # Source: argparse


@dataclass(frozen=True, slots=True)
class Launched:
    """Owner: whoever launched stops `server`."""

    server: ServerProcess
    url: str
    without: frozenset[str]  # optional flags that it did not know


@dataclass(frozen=True, slots=True)
class Launcher:
    """How one kind of engine is started."""

    name: str
    command: Callable[[int, Collection[str]], list[str]]  # of a port, and of the optional flags that it does not know
    environment: Mapping[str, str]
    unusable: Callable[[Sequence[str]], Collection[str]]  # of what it said: flags that we would like, can do without, and it cannot have
    is_up: Callable[[str], bool]  # of its URL
    progress: Callable[[Sequence[str]], str]
    last_words: Callable[[str], str | None] = lambda line: None  # see `ServerProcess`
    secrets: Collection[str] = ()

    def launch(self, timeout_s: float) -> Launched:
        """Returns once it is up. Raises: ModelLoadError, ConfigurationError; then nothing is left running."""
        without: frozenset[str] = frozenset()
        while True:
            port = free_port()
            url = f"http://127.0.0.1:{port}"
            command = self.command(port, without)
            log.info("starting %s: %s", self.name, without_secrets(shlex.join(command), self.secrets))
            server = ServerProcess(self.name, command, self.environment, self.last_words, self.secrets)
            try:
                server.wait_until(lambda url=url: self.is_up(url), self.progress, timeout_s)  # type: ignore[misc]
                return Launched(server, url, without)
            except ModelLoadError:
                server.stop()
                unusable = frozenset(self.unusable(server.lines)) - without
                if not unusable:
                    raise
                log.warning("this %s does not know %s, or what it needs: starting it without", self.name, ", ".join(sorted(unusable)))
                without |= unusable
            except BaseException:
                server.stop()
                raise


def unknown_flags(lines: Sequence[str]) -> frozenset[str]:
    """Flags that a server which ended had complained of."""
    return frozenset(word for line in lines if (found := _UNKNOWN.search(line)) for word in found[1].split())


def await_attached(name: str, url: str, is_up: Callable[[str], bool], timeout_s: float = ATTACH_TIMEOUT_S) -> None:
    """Raises: ModelLoadError if nothing answers in time."""
    began_s = told_s = time.monotonic()
    while not is_up(url):
        now_s = time.monotonic()
        if now_s - began_s > timeout_s:
            raise ModelLoadError(f"no {name} answers at {url} (GET /health) after {timeout_s:.0f} s; start it, or correct --attach")
        if now_s - told_s >= 5.0:
            told_s = now_s
            log.info("waiting for %s at %s: it does not answer yet (%.0f s)", name, url, now_s - began_s)
        time.sleep(0.2)


def checked_url(text: str) -> str:
    """Without a slash at its end. Raises: ConfigurationError."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
        raise ConfigurationError(f"--attach {text} is no address of a server; write for example http://127.0.0.1:8000")
    return text.rstrip("/")


def free_port() -> int:
    """A loopback TCP port that nobody listens on at this moment."""
    return free_ports(1)


def free_ports(count: int) -> int:
    """The first of so many, one after the other."""
    while True:
        with contextlib.ExitStack() as stack:
            first = 0
            try:
                for place in range(count):
                    probe_socket = stack.enter_context(socket.socket())
                    probe_socket.bind(("127.0.0.1", first + place if first else 0))
                    first = first or int(probe_socket.getsockname()[1])
            except (OSError, OverflowError):
                continue
            return first
