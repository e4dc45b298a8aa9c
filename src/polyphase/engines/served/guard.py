"""Stands between a worker and the engine server that it started: `python -m polyphase.engines.served.guard COMMAND…`.

An engine is several processes. They form a group of their own, and this process ends all of it: when it is told to, when the engine's
first process has ended by itself, and when the worker dies, however it does. Its exit code is the engine's; 128 + n after signal n.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from polyphase.runtime.lifeline import Lifeline

GRACE_S = 5.0
_CHECK_INTERVAL_S = 0.5


class _Told(Exception):
    """To end."""


def main(command: list[str]) -> int:
    lifeline = Lifeline()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _raise_told)
    child: subprocess.Popen[bytes] | None = None
    try:
        child = subprocess.Popen(command, start_new_session=True, preexec_fn=Lifeline)  # it ends even if we are killed
        while not lifeline.is_cut():
            try:
                return _as_exit_code(child.wait(_CHECK_INTERVAL_S))
            except subprocess.TimeoutExpired:
                continue
    except _Told:
        pass
    except OSError as error:
        print(f"error: {command[0]} cannot be started: {error.strerror}", file=sys.stderr, flush=True)
        return 127  # Source: what a shell answers
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if child is not None:
            _end_group(child)
    return 128 + signal.SIGTERM


def _raise_told(*_: object) -> None:
    raise _Told


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and what is left after the grace is killed; after a crash nothing is waited for."""
    if child.poll() is None:
        _signal_group(child.pid, signal.SIGTERM)
        give_up_s = time.monotonic() + GRACE_S
        while child.poll() is None and time.monotonic() < give_up_s:
            time.sleep(0.05)
    _signal_group(child.pid, signal.SIGKILL)
    child.wait()


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass  # nobody is left


def _as_exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
