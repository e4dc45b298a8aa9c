"""How a worker falls asleep and wakes: it takes nothing new, waits until nothing runs, and only then its engine sleeps.

    awake ── sleep ──► falling asleep ── nothing runs ──► asleep
      ▲                      │                              │
      └───────── wake ───────┴────────────── wake ──────────┘

Frontends hear of it by the registry, before the engine does, and move what runs to other workers; what nobody takes ends here first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from polyphase.core.errors import PolyphaseError
from polyphase.engines.interface import Sleeper

CHECK_INTERVAL_S = 0.05


class Sleep:
    """Of one worker. `tell` shows frontends whether it takes requests, and raises OSError if they cannot be told."""

    def __init__(self, sleeper: Sleeper, is_busy: Callable[[], bool], tell: Callable[[bool], None]) -> None:
        self._sleeper = sleeper
        self._is_busy = is_busy
        self._tell = tell
        self._falling: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()  # held while the engine is told
        self._is_asleep = False  # the engine

    async def fall_asleep(self) -> str | None:
        """Returns: why not, or None once it is asleep. Whoever asks while it falls asleep waits with the first."""
        try:
            self._tell(True)
            if self._falling is None:
                self._falling = asyncio.create_task(self._fall(), name="falling-asleep")
            await asyncio.shield(self._falling)
        except asyncio.CancelledError:
            if self._falling is not None and not self._falling.cancelled():
                raise  # the caller is cancelled, not the falling asleep
            return "it was woken before it slept"
        except (PolyphaseError, OSError) as error:
            self._tell(False)
            return f"it cannot sleep: {error}"
        finally:
            if self._falling is not None and self._falling.done():
                self._falling = None
        return None

    async def _fall(self) -> None:
        while self._is_busy():  # noqa: ASYNC110  leases end by time, without an event
            await asyncio.sleep(CHECK_INTERVAL_S)
        async with self._lock:
            if not self._is_asleep:
                await self._sleeper.sleep()
                self._is_asleep = True

    async def wake(self) -> str | None:
        """Returns: why not, or None once it is awake."""
        if self._falling is not None and not self._lock.locked():
            self._falling.cancel()
        try:
            async with self._lock:
                if self._is_asleep:
                    await self._sleeper.wake()
                    self._is_asleep = False
            self._tell(False)
        except (PolyphaseError, OSError) as error:
            return f"it cannot wake: {error}"
        return None
