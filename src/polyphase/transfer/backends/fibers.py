"""Virtual time: tasks that sleep, one of which runs at any moment, in an order that depends on a seed and nothing else.

Each task has a thread of its own, but it runs only while it holds the baton, which it hands back when it sleeps or ends.
"""

from __future__ import annotations

import heapq
import random
import threading
from collections.abc import Callable

from polyphase.core.clock import ManualClock

Task = Callable[[], None]


class _Abandoned(BaseException):
    """Thrown into tasks that sleep when the world ends."""


class _Fiber:
    def __init__(self, task: Task) -> None:
        self._task = task
        self._resume = threading.Semaphore(0)
        self._yielded = threading.Semaphore(0)
        self.is_abandoned = False
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="fiber", daemon=True)
        self._thread.start()

    def switch_in(self) -> None:
        """Let it run until it sleeps or ends. Called by the scheduler."""
        self._resume.release()
        self._yielded.acquire()

    def sleep(self) -> None:
        """Called by the task: until the next `switch_in`."""
        self._yielded.release()
        self._resume.acquire()
        if self.is_abandoned:
            raise _Abandoned

    def _run(self) -> None:
        self._resume.acquire()
        try:
            if not self.is_abandoned:
                self._task()
        except _Abandoned:
            pass
        except Exception as error:  # noqa: BLE001  carried to whoever drives the scheduler
            self.error = error
        self._yielded.release()


class Scheduler:
    """Drives tasks through virtual time. One thread calls it; tasks call `sleep`."""

    def __init__(self, rng: random.Random) -> None:
        self.clock = ManualClock()
        self._rng = rng
        self._events: list[tuple[int, float, int, Task]] = []
        self._count = 0
        self._running: list[_Fiber] = []
        self._sleeping: set[_Fiber] = set()

    def call_at(self, at_ns: int, task: Task) -> None:
        """A callback that does not sleep; those of one moment run in random order."""
        self._count += 1
        heapq.heappush(self._events, (max(at_ns, self.clock.now_ns()), self._rng.random(), self._count, task))

    def spawn(self, task: Task) -> None:
        """A task that may sleep."""
        self.call_at(self.clock.now_ns(), lambda: self._switch(_Fiber(task)))

    def sleep(self, duration_ns: int) -> None:
        """Called by a task; the world goes on meanwhile. Elsewhere it runs the world for so long."""
        until_ns = self.clock.now_ns() + duration_ns
        if not self._running:
            self.run_until(until_ns)
            return
        fiber = self._running[-1]
        self._sleeping.add(fiber)
        self.call_at(until_ns, lambda: self._switch(fiber))
        fiber.sleep()

    def _switch(self, fiber: _Fiber) -> None:
        self._sleeping.discard(fiber)
        if fiber.is_abandoned:
            return
        self._running.append(fiber)
        try:
            fiber.switch_in()
        finally:
            self._running.pop()
        if fiber.error is not None:
            raise fiber.error

    def step(self) -> bool:
        """Perform the next event, and let its time come. False: there is none."""
        if not self._events:
            return False
        at_ns, _, _, task = heapq.heappop(self._events)
        self.clock.advance(max(0, at_ns - self.clock.now_ns()))
        task()
        return True

    def run_until(self, until_ns: int) -> None:
        """Perform everything up to a moment, which it is then."""
        while self._events and self._events[0][0] <= until_ns:
            self.step()
        self.clock.advance(max(0, until_ns - self.clock.now_ns()))

    def close(self) -> None:
        """Tasks that sleep are thrown out; their `finally` clauses run."""
        for fiber in list(self._sleeping):
            fiber.is_abandoned = True
            fiber.switch_in()
        self._sleeping.clear()
        self._events.clear()
