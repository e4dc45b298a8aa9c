"""Lets peers in: greets them on a thread that may wait, and then has the reactor watch their connections.

control   frames about leases; its end is the peer's end
notify    goes to the inbox
<backend> requests, each answered by that backend on a serving thread
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from polyphase.core.errors import PeerLost, PolyphaseError
from polyphase.transfer.channel import Guest, SocketChannel
from polyphase.transfer.doors import Doors, call
from polyphase.transfer.greeting import answer, greet
from polyphase.transfer.inbox import Mailbox
from polyphase.transfer.runtime import ThreadRuntime
from polyphase.transfer.wire import Wire
from polyphase.wire.transfer import AgentCard, Greeting

if TYPE_CHECKING:
    from polyphase.transfer.agent import Agent

log = logging.getLogger(__name__)

GREETING_TIMEOUT_NS = 5_000_000_000
ANSWER_TIMEOUT_NS = 60_000_000_000  # requests bring their own; this bounds those that do not
CONTROL, NOTIFY = "control", "notify"


class Reception:
    """The socket side of an agent with threads."""

    def __init__(self, agent: Agent, doors: Doors) -> None:
        assert isinstance(agent.runtime, ThreadRuntime)
        self._agent = agent
        self._doors = doors
        self._runtime = agent.runtime
        self._reactor = agent.runtime.reactor
        self._lock = threading.Lock()
        self._wires: dict[Wire, Callable[[], None]] = {}  # connections of peers, and what is to be done when one ends
        self._mailboxes: set[Mailbox] = set()
        self._is_closed = False

    def open(self) -> None:
        for listener in self._doors.listeners:
            self._reactor.watch(listener, lambda listener=listener: self._accept(listener))  # type: ignore[misc]

    def _accept(self, listener: socket.socket) -> None:
        self._doors.accept(listener, self._agent.clock, self._greet_soon)

    def _greet_soon(self, wire: Wire) -> None:
        with self._lock:
            if self._is_closed:
                wire.close()
                return
            self._wires[wire] = _nothing
        self._runtime.serve(lambda: self._greet(wire))

    def _greet(self, wire: Wire) -> None:
        wire.deadline_ns = self._agent.clock.now_ns() + GREETING_TIMEOUT_NS
        try:
            card = self._agent.card_with_none()
            greeting = answer(wire, card, self._agent.token, purposes={CONTROL, NOTIFY, *self._agent.backend_names()})
        except PolyphaseError as error:
            log.info("a caller was not let in: %s", error.message)
            self._end(wire)
            return
        wire.peer = f"agent {greeting.caller.agent_id}"
        if greeting.purpose == CONTROL:
            self._host(wire, greeting)
        elif greeting.purpose == NOTIFY:
            self._collect(wire, greeting)
        else:
            self._watch(wire, lambda: self._serve(wire, greeting))

    # Control and notifications.

    def _host(self, wire: Wire, greeting: Greeting) -> None:
        guest = Guest(greeting, self._agent.lending)
        with self._lock:
            if self._is_closed or wire not in self._wires:
                wire.close()
                return
            self._wires[wire] = guest.leave

        self._listen(wire, guest)

    def _listen(self, wire: Wire, guest: Guest) -> None:
        def on_readable() -> None:
            self._reactor.forget(wire.socket)
            self._runtime.serve(hear)

        def hear() -> None:
            wire.deadline_ns = self._agent.clock.now_ns() + GREETING_TIMEOUT_NS  # for the rest of a frame that has begun
            try:
                goes_on = guest.handle(wire.receive())
            except PolyphaseError:
                goes_on = False
            if goes_on:
                self._watch(wire, on_readable)
            else:
                self._end(wire)

        self._watch(wire, on_readable)

    def _collect(self, wire: Wire, greeting: Greeting) -> None:
        mailbox = Mailbox(wire.socket, greeting.caller, self._forget_mailbox)
        with self._lock:
            self._wires.pop(wire, None)
            if self._is_closed:
                wire.close()
                return
            self._mailboxes.add(mailbox)
        self._agent.inbox.add(mailbox)

    def _forget_mailbox(self, mailbox: Mailbox) -> None:
        with self._lock:
            self._mailboxes.discard(mailbox)

    # Backends.

    def _serve(self, wire: Wire, greeting: Greeting) -> None:
        """On the reactor: a request has begun to arrive. It is read and answered elsewhere."""
        self._reactor.forget(wire.socket)
        self._runtime.serve(lambda: self._answer(wire, greeting))

    def _answer(self, wire: Wire, greeting: Greeting) -> None:
        """One request, and those that have arrived meanwhile: to wake the reactor and another thread costs more than answering them."""
        try:
            while True:
                wire.deadline_ns = self._agent.clock.now_ns() + ANSWER_TIMEOUT_NS
                self._agent.backend(greeting.purpose).serve(wire, greeting)
                if self._is_closed or not wire.has_arrived():
                    break
        except PolyphaseError as error:
            log.debug("a connection of %s ended: %s", wire.peer, error.message)
            self._end(wire)
            return
        except Exception:  # a backend may be anybody's
            log.exception("a backend failed to answer %s", wire.peer)
            self._end(wire)
            return
        self._watch(wire, lambda: self._serve(wire, greeting))

    def _watch(self, wire: Wire, on_readable: Callable[[], None]) -> None:
        with self._lock:
            if self._is_closed or wire.is_closed:
                wire.close()
                return
            self._reactor.watch(wire.socket, on_readable)

    def _end(self, wire: Wire) -> None:
        self._reactor.forget(wire.socket)
        wire.close()
        with self._lock:
            farewell = self._wires.pop(wire, _nothing)
        farewell()

    # Calling others.

    def dial(self, theirs: AgentCard, purpose: str, session_id: bytes, deadline_ns: int) -> Wire:
        is_local = self._agent.is_on_this_host(theirs)
        if not is_local and not theirs.tcp_address:
            raise PeerLost(f"agent {theirs.agent_id} does not listen for other hosts, and its Unix socket is not in reach")
        wire = call(theirs, is_local=is_local, clock=self._agent.clock, deadline_ns=deadline_ns)
        try:
            greet(wire, self._agent.card_with_none(), theirs, purpose, session_id, b"" if is_local else self._agent.token)
        except BaseException:
            wire.close()
            raise
        return wire

    def open_channel(self, theirs: AgentCard, session_id: bytes, deadline_ns: int) -> SocketChannel:
        control = self.dial(theirs, CONTROL, session_id, deadline_ns)
        try:
            mailbox = Mailbox(self.dial(theirs, NOTIFY, session_id, deadline_ns).socket, theirs, _nothing_more)
        except BaseException:
            control.close()
            raise
        return OwnChannel(self, control, mailbox, self._agent.clock.now_ns)

    def attend(self, channel: OwnChannel) -> None:
        """Watch for the peer's end, and read the replies to notifications."""
        self._agent.inbox.add(channel.mailbox)
        self._reactor.watch(channel.control.socket, channel.lose)

    def leave(self, channel: OwnChannel) -> None:
        self._agent.inbox.remove(channel.mailbox)
        self._reactor.forget(channel.control.socket)

    def close(self) -> None:
        """Nobody is let in any more, and those inside are put out. Idempotent."""
        with self._lock:
            self._is_closed = True
            wires, mailboxes = list(self._wires), list(self._mailboxes)
        for listener in self._doors.listeners:
            self._reactor.forget(listener)
        self._doors.close()
        for wire in wires:
            wire.break_off()  # a thread that answers on it ends
            self._end(wire)
        for mailbox in mailboxes:
            self._agent.inbox.remove(mailbox)
            mailbox.close()


class OwnChannel(SocketChannel):
    """The channel of a session of this agent."""

    def __init__(self, reception: Reception, control: Wire, mailbox: Mailbox, now_ns: Callable[[], int]) -> None:
        super().__init__(control, mailbox, now_ns)
        self._reception = reception
        reception.attend(self)

    def lose(self) -> None:
        super().lose()
        self._reception.leave(self)

    def close(self) -> None:
        self._reception.leave(self)
        super().close()


def _nothing() -> None:
    pass


def _nothing_more(mailbox: Mailbox) -> None:
    pass
