"""One thread per agent that sleeps until a socket becomes readable or a time comes, and then runs a short callback."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from polyphase.core.clock import Clock

log = logging.getLogger(__name__)


class Timer:
    """A task for later."""

    __slots__ = ("_task",)

    def __init__(self, task: Callable[[], None]) -> None:
        self._task: Callable[[], None] | None = task

    def cancel(self) -> None:
        """Idempotent; in vain if it runs already."""
        self._task = None

    def fire(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task()


class Reactor:
    """All methods may be called from any thread; callbacks run on the reactor's own and must be short."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._timers: list[tuple[int, int, Timer]] = []
        self._order = itertools.count()
        self._calls: deque[Callable[[], None]] = deque()
        self._is_closed = False
        self._is_woken = False
        self._selector = selectors.DefaultSelector()
        self._waker, self._bell = socket.socketpair()
        self._waker.setblocking(False)
        self._bell.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ, self._drain_bell)
        self._thread: threading.Thread | None = None

    def call_at(self, at_ns: int, task: Callable[[], None]) -> Timer:
        timer = Timer(task)
        with self._lock:
            if self._is_closed:
                return timer
            heapq.heappush(self._timers, (at_ns, next(self._order), timer))
            is_next = self._timers[0][2] is timer
        if is_next:
            self._wake()
        return timer

    def call_soon(self, task: Callable[[], None]) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._calls.append(task)
        self._wake()

    def watch(self, sock: socket.socket, on_readable: Callable[[], None]) -> None:
        """Until `forget`. Raises: KeyError if it is watched already; OSError or ValueError if it is closed."""
        self._selector.register(sock, selectors.EVENT_READ, on_readable)
        self._wake()

    def forget(self, sock: socket.socket) -> None:
        """Idempotent; to be called before the socket is closed."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(sock)

    def _wake(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="transfer-reactor", daemon=True)
                self._thread.start()
            if self._is_woken or self._thread is threading.current_thread():
                return
            self._is_woken = True
        with contextlib.suppress(BlockingIOError):
            self._waker.send(b"\0")

    def _drain_bell(self) -> None:
        with self._lock:
            self._is_woken = False
        with contextlib.suppress(BlockingIOError):
            self._bell.recv(64)

    def _run(self) -> None:
        while not self._is_closed:
            for key, _ in self._select(self._pause_s()):
                self._call(key.data)
            while self._calls:
                self._call(self._calls.popleft())
            now_ns = self._clock.now_ns()
            while (timer := self._due(now_ns)) is not None:
                self._call(timer.fire)

    def _select(self, pause_s: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        try:
            return self._selector.select(pause_s)
        except (OSError, ValueError):  # a socket was closed by its owner while it was looked at
            return []

    def _pause_s(self) -> float | None:
        with self._lock:
            while self._timers and self._timers[0][2]._task is None:
                heapq.heappop(self._timers)
            if self._calls:
                return 0
            return max(0.0, (self._timers[0][0] - self._clock.now_ns()) / 1e9) if self._timers else None

    def _due(self, now_ns: int) -> Timer | None:
        with self._lock:
            return heapq.heappop(self._timers)[2] if self._timers and self._timers[0][0] <= now_ns else None

    def _call(self, callback: Any) -> None:
        try:
            callback()
        except Exception:  # the root of this callback
            log.exception("a callback of the transfer library failed")

    def close(self) -> None:
        """Nothing runs afterwards. Idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            thread = self._thread
        self._waker.send(b"\0")
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._selector.close()
        self._waker.close()
        self._bell.close()
