"""One line per event on standard error, from every process in the same form: time, level, process, request, message.

    2026-01-31 12:00:00.123 INFO    decode-0 [chatcmpl-6f…] finished: length, 32 tokens

The supervisor sends each process's lines to a file of its own. What people wrote (prompts, outputs) and secrets are never logged.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from polyphase.core.errors import ConfigurationError

_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

LEVELS = ("debug", "info", "warning", "error")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class _LineFormatter(logging.Formatter):
    """Adds the process and the request; a message cannot begin a line of its own, so nobody can write log lines by a request."""

    def __init__(self, process: str) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)-7s %(process_name)s%(request)s %(message)s", "%Y-%m-%d %H:%M:%S")
        self._process = process

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.process_name = self._process
        request_id = _request_id.get()
        record.request = f" [{_one_line(request_id)}]" if request_id else ""
        record.message = _one_line(record.message)
        return super().formatMessage(record)


def _one_line(text: str) -> str:
    return _CONTROL.sub(lambda match: repr(match.group())[1:-1], text)


def configure_logging(process: str, level: str = "info") -> None:
    """Send all log records of this process to standard error. Called once, by a composition root.

    Args:
        process: name on every line, for example a worker id.

    Raises: ConfigurationError for an unknown level.
    """
    if level.lower() not in LEVELS:
        raise ConfigurationError(f"log level {level!r} does not exist; choose one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for talkative in ("httpx", "httpcore", "urllib3", "filelock", "asyncio"):
        logging.getLogger(talkative).setLevel(max(logging.WARNING, root.level))


@contextmanager
def request_context(request_id: str) -> Iterator[None]:
    """Log lines inside, and of tasks started inside, carry this request id."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


def current_request_id() -> str | None:
    return _request_id.get()
