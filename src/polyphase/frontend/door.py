"""The door: counts the requests that are inside, and lets no more in once this frontend is going away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from polyphase.core.errors import Draining


class Door:
    def __init__(self) -> None:
        self.is_closed = False
        self.inside_count = 0
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """Raises: Draining once the door is closed."""
        if self.is_closed:
            raise Draining("this frontend is shutting down; send the request to another one, or again in a moment", retry_after_s=2)
        self.inside_count += 1
        self._is_empty.clear()
        try:
            yield
        finally:
            self.inside_count -= 1
            if not self.inside_count:
                self._is_empty.set()

    def close(self) -> None:
        self.is_closed = True

    async def wait_until_empty(self) -> None:
        await self._is_empty.wait()
