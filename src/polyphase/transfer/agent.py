"""A process's agent of the transfer library.

    with Agent("decode-0") as agent, SharedPool.create(1024, 65536) as pool, agent.register(pool) as region:
        with agent.connect(offer.agent) as session:
            session.read(session.take(offer), region.blocks([7, 3, 12])).wait().require()

It listens for other agents, knows the memory that was registered, and joins peers through the best backend that both have. It has an
epoch: whatever was described by an earlier life of the same name is refused.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import msgspec

from polyphase.core.clock import Clock
from polyphase.core.errors import ConfigurationError, ForeignDescriptor, HandleReleased, StaleDescriptor, TransferRefused
from polyphase.transfer.backends.interface import Backend
from polyphase.transfer.blocks import BlockMemory
from polyphase.transfer.channel import SocketChannel
from polyphase.transfer.choice import choose
from polyphase.transfer.doors import Doors, host_id, why_not_by_unix
from polyphase.transfer.inbox import Inbox, Notification
from polyphase.transfer.lending import Lending, OnEnd
from polyphase.transfer.reactor import Timer
from polyphase.transfer.reception import Reception
from polyphase.transfer.region import Region
from polyphase.transfer.runtime import Runtime, ThreadRuntime
from polyphase.transfer.session import Session
from polyphase.transfer.verdicts import Verdict
from polyphase.transfer.wire import Wire
from polyphase.wire.layout import KvLayout, KvShape
from polyphase.wire.transfer import AgentCard, RegionCard, decode_card, encode_card

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0

_living: weakref.WeakSet[Agent] = weakref.WeakSet()


class Agent:
    """One per process is enough; several are possible. Any thread. Owner: the caller, by `with` or `close`; else at interpreter exit."""

    def __init__(
        self,
        agent_id: str,
        *,
        backends: Sequence[Backend] | None = None,
        unix_path: str | None = None,
        tcp_address: str | None = None,
        token: bytes = b"",
        epoch: int | None = None,
        host: str | None = None,
        runtime: Runtime | None = None,
    ) -> None:
        """Listen, and start the backends that can work here.

        Args:
            agent_id: outlives restarts, for example a worker's id.
            backends: None for `shm` and `tcp`.
            unix_path: where agents of this host call; None for a private folder, removed at the end.
            tcp_address: "host:port", where agents of other hosts call, port 0 for any; None: they cannot.
            token: whoever calls over TCP must know it too; empty: anybody who reaches the port may read what is registered.
            epoch: greater in each later life; None for the time.
            host: equal on agents that share a running system; None for what the system says.

        Raises: ConfigurationError.
        """
        if not agent_id or len(agent_id) > 200:
            raise ConfigurationError(f"an agent's id must have 1 to 200 characters, not {len(agent_id)}")
        self.runtime: Runtime = runtime or ThreadRuntime()
        self.lending = Lending()
        self.inbox = Inbox()
        self._token = token
        self._lock = threading.Lock()
        self._regions: dict[str, Region] = {}
        self._sessions: set[Session] = set()
        self._is_closed = False
        with contextlib.ExitStack() as undo:
            undo.callback(self.runtime.close)
            undo.callback(self.inbox.close)
            doors = Doors(unix_path, tcp_address) if isinstance(self.runtime, ThreadRuntime) else None
            self._card = AgentCard(
                agent_id=agent_id,
                epoch=time.time_ns() if epoch is None else epoch,
                host_id=host or host_id(),
                user_id=os.getuid(),
                unix_path=doors.unix_path if doors else "",
                tcp_address=doors.tcp_address if doors else "",
                has_token=bool(token),
                backends=[],
            )
            if doors is not None:
                undo.callback(doors.close)
            self._backends: dict[str, Backend] = {}
            self.unavailable: dict[str, str] = {}  # backends that cannot work here, with the reason
            self._reception = Reception(self, doors) if doors is not None else None
            for backend in default_backends() if backends is None else backends:
                self._start(backend, undo)
            if self._reception is not None:
                self._reception.open()
            undo.pop_all()
        _living.add(self)

    def _start(self, backend: Backend, undo: contextlib.ExitStack) -> None:
        if backend.name in self._backends:
            raise ConfigurationError(f"the backend {backend.name!r} was given twice")
        try:
            found = backend.start(self)
        except TransferRefused as error:
            self.unavailable[backend.name] = error.message
            return
        self._backends[backend.name] = backend
        undo.callback(backend.close)
        self._card = msgspec.structs.replace(self._card, backends=[*self._card.backends, found])

    # What it is.

    @property
    def card(self) -> AgentCard:
        """For peers: with all regions that are registered now."""
        with self._lock:
            return msgspec.structs.replace(self._card, regions=[region.card for region in self._regions.values()])

    def card_with(self, region: RegionCard) -> AgentCard:
        """The card with one region only: what an offer carries."""
        return msgspec.structs.replace(self._card, regions=[region])

    def card_with_none(self) -> AgentCard:
        """The card without regions: enough to be greeted."""
        return self._card

    def metadata(self) -> bytes:
        """The card as bytes, to be sent to peers by any means; `connect` takes them."""
        return encode_card(self.card)

    @property
    def clock(self) -> Clock:
        return self.runtime.clock

    @property
    def token(self) -> bytes:
        return self._token

    def is_on_this_host(self, theirs: AgentCard) -> bool:
        return why_not_by_unix(self._card, theirs) is None

    # Memory.

    def register(self, memory: BlockMemory, layout: KvLayout | None = None, shape: KvShape | None = None) -> Region:
        """Let peers reach `memory`, through the backends that can.

        `layout` and `shape` say what its blocks mean; without `shape`, peers can use them as they are only.

        Raises: ForeignDescriptor if no backend can do anything with it, or it is registered already; HandleReleased after `close`.
        Owner: the caller releases the region, and then its memory.
        """
        if layout is not None and layout.block_bytes != memory.block_bytes:
            raise ForeignDescriptor(f"the memory's blocks have {memory.block_bytes} bytes, but the layout says {layout.block_bytes}")
        if shape is not None:
            shape.check()
            if shape.block_bytes != memory.block_bytes:
                raise ForeignDescriptor(f"the memory's blocks have {memory.block_bytes} bytes, but the shape says {shape.block_bytes}")
        reasons = {name: backend.why_not(memory) for name, backend in self._backends.items()}
        reachable = [name for name, reason in reasons.items() if reason is None]
        usable = [name for name, backend in self._backends.items() if backend.moves(memory.kind)]
        if not usable:
            raise ForeignDescriptor(f"no backend of this agent moves {memory.kind} memory: {reasons}")
        region = Region(self, memory, layout, shape, reachable, usable)
        with self._lock:
            self._check()
            if region.region_id in self._regions:
                raise ForeignDescriptor(f"the memory of region {region.region_id} is registered already")
            self._regions[region.region_id] = region
        try:
            for name in usable:
                self._backends[name].attach(region)
        except BaseException:
            region.release()
            raise
        return region

    def region(self, region_id: str) -> Region:
        """Raises: StaleDescriptor if it is not registered (any more)."""
        with self._lock:
            region = self._regions.get(region_id)
        if region is None:
            raise StaleDescriptor(f"agent {self._card.agent_id} has no region {region_id}; it was released, or is of an earlier life")
        return region

    def region_of(self, memory: BlockMemory) -> Region | None:
        """The registration of this very memory, if there is one."""
        with self._lock:
            return next((region for region in self._regions.values() if region.memory is memory), None)

    def lend(self, region: Region, block_ids: list[int], ttl_s: float, on_end: OnEnd | None, lease_id: str | None = None) -> str:
        """A lease on blocks of a region, named by the caller if it keeps leases of its own; returns its id.

        Raises: KvError if there is one of this name.
        """
        lease_id = lease_id or secrets.token_hex(8)
        expires_at_ns = self.clock.now_ns() + int(ttl_s * 1e9)
        self.lending.lend(lease_id, region.region_id, block_ids, expires_at_ns, on_end)
        self.runtime.call_at(expires_at_ns, self._expire_leases)
        return lease_id

    def _expire_leases(self) -> None:
        expired = self.lending.expire(self.clock.now_ns())
        if expired:
            log.info("%d leases ran out before their blocks were given back", expired)

    def forget_region(self, region: Region) -> None:
        """The region is being released: what uses it ends."""
        with self._lock:
            self._regions.pop(region.region_id, None)
            sessions = list(self._sessions)
        self.lending.end_region(region.region_id)
        for session in sessions:
            for transfer in session.running():
                if transfer.uses(region):
                    transfer.give_up(Verdict.CANCELLED)

    def detach_region(self, region: Region) -> None:
        for name in region.usable_backends:
            self._backends[name].detach(region)

    # Peers.

    def connect(self, card: AgentCard | bytes, timeout_s: float = CONNECT_TIMEOUT_S) -> Session:
        """Meet another agent.

        Args:
            card: what its `metadata` or `card` was, or what came with an offer.

        Raises: TransferRefused with the reason for each backend if there is no way; StaleDescriptor if the peer has begun a new life;
            PeerLost, TransferTimeout; WireError if the bytes are no card.
        """
        theirs = decode_card(card) if isinstance(card, bytes) else card
        self._check()
        choice = choose(self._card, theirs, list(self._backends.values()), self.unavailable)
        choice.require(theirs.agent_id)
        session_id = secrets.token_bytes(16)
        deadline_ns = self.clock.now_ns() + int(timeout_s * 1e9)
        channel = self._backends[choice.possible[0]].open_channel(theirs, session_id, deadline_ns)
        session = Session(self, theirs, choice, session_id, channel)
        with self._lock:
            is_late = self._is_closed
            self._sessions.add(session)
        if is_late:
            session.release()
            self._check()
        return session

    async def connect_async(self, card: AgentCard | bytes, timeout_s: float = CONNECT_TIMEOUT_S) -> Session:
        """The same on an event loop. Cancel: the attempt is given up; a session that comes about nevertheless is released."""
        made: Future[Session] = Future()

        def connect() -> None:
            try:
                session = self.connect(card, timeout_s)
            except BaseException as error:  # noqa: BLE001  carried to whoever awaits
                made.set_exception(error)
                return
            made.set_result(session)

        self.runtime.serve(connect)
        try:
            return await asyncio.shield(asyncio.wrap_future(made))
        except asyncio.CancelledError:
            made.add_done_callback(lambda done: None if done.exception() else done.result().release())
            raise

    def submit(self, task: Callable[[], None]) -> None:
        self.runtime.submit(task)

    def call_at(self, at_ns: int, task: Callable[[], None]) -> Timer:
        return self.runtime.call_at(at_ns, task)

    def backend(self, name: str) -> Backend:
        return self._backends[name]

    def backend_names(self) -> list[str]:
        return list(self._backends)

    def forget_session(self, session: Session) -> None:
        with self._lock:
            self._sessions.discard(session)

    def dial(self, theirs: AgentCard, purpose: str, session_id: bytes, deadline_ns: int) -> Wire:
        """See `Services.dial`."""
        if self._reception is None:
            raise TransferRefused("this agent has no sockets")
        return self._reception.dial(theirs, purpose, session_id, deadline_ns)

    def open_socket_channel(self, theirs: AgentCard, session_id: bytes, deadline_ns: int) -> SocketChannel:
        """See `Services.open_socket_channel`."""
        if self._reception is None:
            raise TransferRefused("this agent has no sockets")
        return self._reception.open_channel(theirs, session_id, deadline_ns)

    # Notifications.

    def notification(self, timeout_s: float | None = None) -> Notification:
        """The next from any peer. Raises: TransferTimeout, HandleReleased."""
        return self.runtime.receive(self.inbox, timeout_s)

    async def next_notification(self) -> Notification:
        return await self.inbox.next()

    def close(self) -> None:
        """Release sessions and regions, stop listening, join all threads. Idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            sessions, regions = list(self._sessions), list(self._regions.values())
        if self._reception is not None:
            self._reception.close()
        for session in sessions:
            with contextlib.suppress(HandleReleased):
                session.release()
        for region in regions:
            with contextlib.suppress(HandleReleased):
                region.release()
        for backend in self._backends.values():
            backend.close()
        self.inbox.close()
        self.runtime.close()
        _living.discard(self)

    def _check(self) -> None:
        if self._is_closed:
            raise HandleReleased(f"agent {self._card.agent_id} is closed")

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def default_backends() -> list[Backend]:
    """What needs nothing but this package."""
    from polyphase.transfer.backends.shm import ShmBackend
    from polyphase.transfer.backends.tcp import TcpBackend

    return [ShmBackend(), TcpBackend()]


@atexit.register
def _close_all() -> None:
    for agent in list(_living):
        agent.close()
