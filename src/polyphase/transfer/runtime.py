"""Where an agent's work happens: threads that sleep until there is something to do, and one that watches sockets and the time.

The `memory` backend brings a runtime of its own, without threads, in which nothing happens until it is told to: for tests and the twin.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from polyphase.core.clock import Clock, MonotonicClock
from polyphase.transfer.inbox import Inbox, Notification
from polyphase.transfer.reactor import Reactor, Timer

log = logging.getLogger(__name__)

Task = Callable[[], None]

MAX_COPY_THREADS = 16  # most of them sleep on a slow peer
MAX_SERVING_THREADS = 32


class Runtime(Protocol):
    """Runs what an agent wants done."""

    @property
    def clock(self) -> Clock: ...

    def submit(self, task: Task) -> None:
        """Run soon; it may take as long as a transfer."""

    def serve(self, task: Task) -> None:
        """Run soon, on behalf of a peer, which may be slow or dead; never in the way of this agent's own transfers."""

    def call_at(self, at_ns: int, task: Task) -> Timer:
        """Run a short task at a time of `clock`, or never if the timer is cancelled before."""

    def wait(self, future: Future[Any], timeout_s: float | None) -> None:
        """Return when the future is done. Raises: TimeoutError."""

    def receive(self, inbox: Inbox, timeout_s: float | None) -> Notification:
        """The inbox's next. Raises: TransferTimeout, HandleReleased."""

    def close(self) -> None:
        """Drop what has not begun, and wait for what has."""


class ThreadRuntime:
    """Sleeping threads, made when they are first needed."""

    def __init__(self) -> None:
        self.clock: Clock = MonotonicClock()
        self.reactor = Reactor(self.clock)
        self._copying = ThreadPool("transfer-copy", MAX_COPY_THREADS)
        self._serving = ThreadPool("transfer-serve", MAX_SERVING_THREADS)

    def submit(self, task: Task) -> None:
        self._copying.submit(task)

    def serve(self, task: Task) -> None:
        self._serving.submit(task)

    def call_at(self, at_ns: int, task: Task) -> Timer:
        return self.reactor.call_at(at_ns, task)

    def wait(self, future: Future[Any], timeout_s: float | None) -> None:
        future.exception(timeout_s)

    def receive(self, inbox: Inbox, timeout_s: float | None) -> Notification:
        return inbox.get(timeout_s)

    def close(self) -> None:
        self.reactor.close()
        self._serving.close()
        self._copying.close()


class ThreadPool:
    """Up to `limit` daemon threads; an idle one sleeps. A task that raises is logged.

    Not concurrent.futures': those threads are joined at exit before anybody could tell them to stop.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._tasks: deque[Task] = deque()
        self._threads: list[threading.Thread] = []
        self._idle_count = 0
        self._is_closed = False
        self._changed = threading.Condition()

    def submit(self, task: Task) -> None:
        """After `close`, the task is dropped."""
        with self._changed:
            if self._is_closed:
                return
            self._tasks.append(task)
            if self._idle_count < len(self._tasks) and len(self._threads) < self._limit:
                thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
            else:
                self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle_count += 1
                while not self._tasks and not self._is_closed:
                    self._changed.wait()
                self._idle_count -= 1
                if self._is_closed:
                    return
                task = self._tasks.popleft()
            try:
                task()
            except Exception:  # the root of this task
                log.exception("a task of the transfer library failed")
            del task  # an idle thread keeps nothing alive

    def close(self) -> None:
        """Idempotent; a thread of the pool itself is not waited for."""
        with self._changed:
            self._is_closed = True
            self._tasks.clear()
            self._changed.notify_all()
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()
