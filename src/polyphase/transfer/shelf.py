"""Connections to one peer for one purpose: taken for one conversation, put back when it went well, made anew when there is none."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from polyphase.core.errors import PeerLost
from polyphase.transfer.wire import Wire

MAX_IDLE = 8


class Shelf:
    """Any thread. Owner: a link, by `close`."""

    def __init__(self, dial: Callable[[int], Wire], peer: str) -> None:
        """`dial` makes a greeted connection by a deadline."""
        self._dial = dial
        self._peer = peer
        self._lock = threading.Lock()
        self._idle: list[Wire] = []
        self._busy: set[Wire] = set()
        self._is_closed = False

    @contextlib.contextmanager
    def wire(self, deadline_ns: int) -> Iterator[Wire]:
        """For one conversation that leaves nothing unsaid; if the block raises, the connection is closed. Raises: as `dial`."""
        wire = self._take(deadline_ns)
        wire.deadline_ns = deadline_ns
        try:
            yield wire
        except BaseException:
            wire.close()
            raise
        finally:
            self._put_back(wire)

    def _take(self, deadline_ns: int) -> Wire:
        with self._lock:
            self._check()
            wire = self._idle.pop() if self._idle else None
            if wire is not None:
                self._busy.add(wire)
                return wire
        wire = self._dial(deadline_ns)
        with self._lock:
            if self._is_closed:
                wire.close()
            self._check()
            self._busy.add(wire)
        return wire

    def _put_back(self, wire: Wire) -> None:
        with self._lock:
            self._busy.discard(wire)
            if not wire.is_closed:
                if self._is_closed or len(self._idle) >= MAX_IDLE:
                    wire.close()
                else:
                    self._idle.append(wire)

    def _check(self) -> None:
        if self._is_closed:
            raise PeerLost(f"the session with {self._peer} has ended")

    def close(self) -> None:
        """Conversations under way are broken off. Idempotent."""
        with self._lock:
            self._is_closed = True
            for wire in self._idle:
                wire.close()
            self._idle.clear()
            for wire in self._busy:
                wire.break_off()
