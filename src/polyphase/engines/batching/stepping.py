"""Drives an engine's core on an event loop, one step after the other, and sleeps while there is nothing to do.

    loop       begin_step ──┐                   ┌── finish_step ─ on_step(report) ─ begin_step …
    elsewhere               └─ perform ─────────┘

While a step is performed the loop is free: requests come and go, and take effect when the step is finished.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from polyphase.core.clock import Clock
from polyphase.engines.batching.core import EngineCore
from polyphase.engines.batching.outcome import StepOutcome
from polyphase.engines.batching.scheduler import StepPlan
from polyphase.engines.interface import StepReport

Perform = Callable[[StepPlan], "asyncio.Future[StepOutcome]"]
"""Begins a step, somewhere off the loop; the future ends with the step and does not raise."""


class StepLoop:
    """`wake` is called after whatever may give an idle engine something to do."""

    def __init__(self, core: EngineCore, clock: Clock, perform: Perform) -> None:
        self._core = core
        self._clock = clock
        self._perform = perform
        self._awake = asyncio.Event()
        self._running_on: asyncio.AbstractEventLoop | None = None

    def wake(self) -> None:
        self._awake.set()

    def wake_from_thread(self) -> None:
        """As `wake`, from any thread. While nothing runs there is nobody to be woken: `run` begins by looking."""
        loop = self._running_on
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it was closed just now
                loop.call_soon_threadsafe(self._awake.set)

    async def run(self, on_step: Callable[[StepReport], None]) -> None:
        """Cancel: the step under way is finished and its results are kept, but not reported before the next `run`."""
        self._awake = asyncio.Event()  # belongs to the loop that runs us
        self._running_on = asyncio.get_running_loop()
        while True:
            self._awake.clear()
            plan = self._core.begin_step()
            if plan.is_empty:
                report = self._core.take_idle_report()
                if report is not None:
                    on_step(report)
                if not plan.preempted:
                    await self._sleep()
                continue
            on_step(await self._step(plan))

    async def _step(self, plan: StepPlan) -> StepReport:
        work = self._perform(plan)
        try:
            outcome = await asyncio.shield(work)
        except asyncio.CancelledError:
            while not work.done():  # the step's results must not be lost, however often we are told to go
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([work])
            self._core.keep_for_later(self._core.finish_step(work.result(), plan))
            raise
        return self._core.finish_step(outcome, plan)

    async def _sleep(self) -> None:
        """Until something is submitted, aborted or released, or a lease runs out."""
        expiry_ns = self._core.exports.leases.next_expiry_ns
        timeout_s = None if expiry_ns is None else max(0.0, (expiry_ns - self._clock.now_ns()) / 1e9) + 1e-3
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._awake.wait()
