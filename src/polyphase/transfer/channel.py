"""What two agents say to each other besides blocks: leases taken and given back, notifications, and that one of them is still there.

A session has two connections for it. On the control connection short frames go one way and its end means that the peer is gone; it is
watched by the reactor. The notification connection is read by whoever waits for notifications.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Protocol

from polyphase.core.errors import PeerLost, PolyphaseError
from polyphase.transfer.inbox import Mailbox
from polyphase.transfer.lending import LeaseEnd, Lending
from polyphase.transfer.wire import Wire
from polyphase.wire.transfer import AgentCard, Frame, Goodbye, Greeting, Release, Take

log = logging.getLogger(__name__)

SEND_TIMEOUT_NS = 2_000_000_000  # control frames are few and short; who does not take them is as good as gone


class Channel(Protocol):
    """The caller's end."""

    @property
    def is_lost(self) -> bool: ...

    def take(self, lease_id: str) -> None:
        """Raises: PeerLost."""

    def release(self, lease_id: str) -> None:
        """Raises: PeerLost."""

    def notify(self, payload: bytes, timeout_s: float) -> None:
        """Raises: PeerLost, TransferTimeout, TransferError."""

    def close(self) -> None:
        """The peer ends the leases that were taken. Idempotent."""


class SocketChannel:
    """Two greeted connections."""

    def __init__(self, control: Wire, mailbox: Mailbox, now_ns: Callable[[], int]) -> None:
        self.control = control
        self.mailbox = mailbox
        self.is_lost = False
        self._now_ns = now_ns
        self._sending = threading.Lock()

    def take(self, lease_id: str) -> None:
        self._send(Take(lease_id))

    def release(self, lease_id: str) -> None:
        self._send(Release(lease_id))

    def notify(self, payload: bytes, timeout_s: float) -> None:
        if self.is_lost:
            raise PeerLost(f"{self.control.peer} has gone")
        self.mailbox.send(payload, timeout_s)

    def close(self) -> None:
        with contextlib.suppress(PolyphaseError):
            self._send(Goodbye())
        self.mailbox.close()
        self.control.close()

    def lose(self) -> None:
        """The reactor saw the connection end."""
        self.is_lost = True

    def _send(self, frame: Frame) -> None:
        with self._sending:
            if self.is_lost or self.control.is_closed:
                raise PeerLost(f"{self.control.peer} has gone")
            self.control.deadline_ns = self._now_ns() + SEND_TIMEOUT_NS
            self.control.send(frame)


class Guest:
    """The called side's end: one session that some peer has with this agent."""

    def __init__(self, greeting: Greeting, lending: Lending) -> None:
        self.peer: AgentCard = greeting.caller
        self.session_id = greeting.session_id
        self._lending = lending
        self._taken: dict[str, None] = {}
        self._is_gone = False

    def handle(self, frame: Frame) -> bool:
        """False: the peer takes its leave."""
        match frame:
            case Take(lease_id):
                if self._lending.take(lease_id):
                    self._taken[lease_id] = None
            case Release(lease_id):
                self._taken.pop(lease_id, None)
                self._lending.end(lease_id, LeaseEnd("released"))
            case Goodbye():
                return False
            case _:
                log.warning("agent %s sent a %s frame where none is expected", self.peer.agent_id, type(frame).__name__)
                return False
        return True

    def leave(self) -> None:
        """The peer is gone, whichever way: what it had taken is free, unless others took it too. Idempotent."""
        if self._is_gone:
            return
        self._is_gone = True
        for lease_id in self._taken:
            self._lending.drop(lease_id)
        self._taken.clear()
