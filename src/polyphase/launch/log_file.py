"""The log of one process: its lines as a person needs them, and a bound on its size."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

MAX_LOG_BYTES = 10 * 1024**2  # then it becomes NAME.log.1, in place of the one before
_TAIL_BYTES = 16 * 1024
# Source: observe/logs.py
_LINE = re.compile(r"\d{4}-\d\d-\d\d \S+ (?P<level>[A-Z]+) +\S+ (?:\[[^\]]*\] )?(?P<message>.*)")


class LogFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def open_for_process(self) -> int:
        """File descriptor for a child's output. Appending, so that the file can be cut short under it. Owner: the caller."""
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def lines(self) -> list[str]:
        """The last lines, without empty ones."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        # A progress bar rewrites its line with carriage returns: what counts is the latest state.
        lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
        return [line for line in lines if line]

    def last_message(self) -> str:
        """What the process said last, without time and name; empty if it said nothing."""
        lines = self.lines()
        return message_of(lines[-1]) if lines else ""

    def last_error(self) -> str:
        return last_error_of(self.lines())

    def trim(self, max_bytes: int = MAX_LOG_BYTES) -> None:
        """Bound the file. What a process writes in the instant between copying and cutting is lost."""
        try:
            if self.path.stat().st_size > max_bytes:
                shutil.copyfile(self.path, self.path.with_suffix(".log.1"))
                os.truncate(self.path, 0)
        except OSError:
            pass  # no log, or no room for a copy: the process matters more than its log


def message_of(line: str) -> str:
    found = _LINE.fullmatch(line)
    return found["message"] if found else line.strip().removeprefix("error: ")


def last_error_of(lines: Sequence[str]) -> str:
    """The last line logged as an error; else the last one, which for an uncaught exception is the exception itself."""
    for line in reversed(lines):
        found = _LINE.fullmatch(line)
        if found and found["level"] in ("ERROR", "CRITICAL"):
            return found["message"]
    return message_of(lines[-1]) if lines else ""
