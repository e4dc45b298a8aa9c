"""The first signal to end stops what a supervisor keeps running, in order; a second one kills it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from polyphase.launch.supervisor import Supervisor


@contextmanager
def signals_handled(supervisor: Supervisor) -> Iterator[None]:
    """SIGINT, SIGTERM and, unless it is ignored, SIGHUP."""
    loop = asyncio.get_running_loop()
    heard = 0

    def hear_signal() -> None:
        nonlocal heard
        heard += 1
        if heard == 1:
            supervisor.stop()
        else:
            supervisor.kill()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # else it was started with nohup, to outlive the terminal
        numbers.append(signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, hear_signal)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
