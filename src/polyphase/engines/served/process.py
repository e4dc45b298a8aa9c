"""A stock engine server as a child of the worker: started, heard, waited for, ended with all its processes, and explained if it ends."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence

from polyphase.core.errors import ModelLoadError

log = logging.getLogger(__name__)

KEPT_LINES = 400
LAST_WORDS_S = 20.0  # what was complained of earlier is not why it ended
PROGRESS_INTERVAL_S = 5.0
_POLL_S = 0.2
_STOP_TIMEOUT_S = 12.0  # the guard kills after five seconds
_MAX_LINE = 2000
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_COMPLAINT = re.compile(r"(?:\b\w*(?:Error|Exception)\b|\berror)\s*:\s*\S")


class ServerProcess:
    """Owner: whoever made it stops it. Its output goes on in our own log, line by line behind the engine's name."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        last_words: Callable[[str], str | None] = lambda line: None,
        secrets: Collection[str] = (),
    ) -> None:
        """Raises: nothing; a command that does not exist ends like a server that crashed.

        Args:
            environment: on top of our own.
            last_words: of a line of its output. Some servers say that they cannot go on long before they have ended, or end themselves by
                SIGKILL: the cause, if the line tells it; empty if it was complained of before; None: the line is no such.
            secrets: not to be seen in our log.
        """
        self.name = name
        self.command = list(command)
        self._last_words = last_words
        self._secrets = secrets
        self._cause: str | None = None  # as the first of its last words told it
        self._lines: deque[tuple[float, str]] = deque(maxlen=KEPT_LINES)  # with when it was said
        self._process = subprocess.Popen(
            [sys.executable, "-m", "polyphase.engines.served.guard", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, name=f"{name}-log", daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def lines(self) -> list[str]:
        """The latest, oldest first."""
        return [line for _, line in self._lines]

    def has_ended(self) -> bool:
        """Or is about to, and serves nobody any more."""
        return self._cause is not None or self._process.poll() is not None

    def wait_until(self, is_ready: Callable[[], bool], progress: Callable[[Sequence[str]], str], timeout_s: float) -> None:
        """`progress` makes a phrase of what was said so far; it is logged every few seconds.

        Raises: ModelLoadError if the server ends before, or is not ready in time.
        """
        began_s = told_s = time.monotonic()
        while not is_ready():
            now_s = time.monotonic()
            if self.has_ended():
                raise ModelLoadError(self.why_ended())
            if now_s - began_s > timeout_s:
                raise ModelLoadError(f"{self.name} is not ready after {timeout_s:.0f} s; last seen: {progress(self.lines)}")
            if now_s - told_s >= PROGRESS_INTERVAL_S:
                told_s = now_s
                log.info("waiting for %s: %s (%.0f s)", self.name, progress(self.lines), now_s - began_s)
            time.sleep(_POLL_S)

    def why_ended(self) -> str:
        """One sentence: how it ended, and its last complaint. Only after it has ended."""
        if self._cause is None:
            self._listener.join(timeout=1.0)  # its last words may still be in the pipe
        code = self._process.poll()
        if self._cause:
            return f"{self.name} ended: {self._cause}"
        if self._cause is None and code in (128 + signal.SIGKILL, -signal.SIGKILL):
            return f"{self.name} was killed by SIGKILL: somebody did that, or the kernel for want of memory"
        until_s = self._lines[-1][0] if self._lines else 0.0
        complaint = complaint_of([line for said_s, line in self._lines if until_s - said_s < LAST_WORDS_S])
        how = "" if self._cause is not None and complaint else f" ({_end_phrase(code)})"
        return f"{self.name} ended{how}" + (f": {complaint}" if complaint else "")

    def stop(self) -> None:
        """End it and whatever it started. Idempotent."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._listener.join(timeout=1.0)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for data in output:
                line = _COLOUR.sub("", data.decode(errors="replace")).rstrip().rsplit("\r", 1)[-1]
                line = without_secrets(line, self._secrets)[:_MAX_LINE]
                if line and self._cause is None:
                    self._cause = self._last_words(line)
                if line:
                    self._lines.append((time.monotonic(), line))
                    log.info("%s | %s", self.name, line)


def without_secrets(text: str, secrets: Collection[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def complaint_of(lines: Sequence[str]) -> str:
    """The last line that names an error and does not point elsewhere for the cause; empty if none does."""
    found = [line for line in lines if _COMPLAINT.search(line) and "root cause" not in line]
    return found[-1][_COMPLAINT.search(found[-1]).start() :].strip() if found else ""  # type: ignore[union-attr]


def _end_phrase(code: int | None) -> str:
    if code is None:
        return "still ending"
    number = code - 128 if code > 128 else -code
    if number > 0:
        try:
            return f"killed by {signal.Signals(number).name}"
        except ValueError:
            pass
    return f"exit code {code}"
