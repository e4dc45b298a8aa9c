"""Agents in one process, in virtual time: nothing happens until it is told to, and what goes wrong follows from a seed.

    network = MemoryNetwork(seed=7, faults=Faults(corrupt=0.1))
    a = Agent("a", backends=[network.backend()], runtime=network.runtime())

Waiting for a transfer runs the network until it has ended. `crash` kills an agent as kill -9 would. For tests, and for the twin.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from xxhash import xxh3_64_intdigest

from polyphase.core.clock import Clock
from polyphase.core.errors import HandleReleased, PeerLost, StaleDescriptor, TransferTimeout
from polyphase.transfer.agent import Agent
from polyphase.transfer.backends.fibers import Scheduler
from polyphase.transfer.backends.interface import Job, Judgement, Services
from polyphase.transfer.blocks import BlockMemory, HostBlocks
from polyphase.transfer.channel import Channel, Guest
from polyphase.transfer.inbox import Inbox, Notification
from polyphase.transfer.reactor import Timer
from polyphase.transfer.region import Region
from polyphase.transfer.verdicts import Verdict
from polyphase.transfer.wire import Wire
from polyphase.wire.transfer import AgentCard, BackendCard, Frame, Goodbye, Greeting, Release, Take

RANK = 1000.0


@dataclass(frozen=True, slots=True)
class Faults:
    """Probabilities, each for one block unless it says otherwise; delays in nanoseconds."""

    lose: float = 0.0  # the connection breaks before it
    corrupt: float = 0.0  # a byte of it changes on the way
    stall: float = 0.0  # nothing moves any more before it, and nobody says so
    reorder: bool = False  # blocks go in any order
    block_delay_ns: tuple[int, int] = (1_000, 10_000)  # from, to
    message_delay_ns: tuple[int, int] = (1_000, 100_000)  # of leases and notifications; their order stays


class MemoryNetwork:
    """Joins the agents made on it. One thread drives it. Owner: the caller, by `close`, after the agents."""

    def __init__(self, seed: int = 0, faults: Faults = Faults()) -> None:
        self.faults = faults
        self.rng = random.Random(seed)
        self.scheduler = Scheduler(self.rng)
        self.lives: dict[str, MemoryBackend] = {}  # by agent id: the present one

    def backend(self) -> MemoryBackend:
        """For one agent."""
        return MemoryBackend(self)

    def runtime(self) -> MemoryRuntime:
        """For one agent."""
        return MemoryRuntime(self.scheduler)

    def run(self, duration_ns: int) -> None:
        """Let time pass."""
        self.scheduler.sleep(duration_ns)

    def crash(self, agent_id: str) -> None:
        """The agent's process is gone: its memory cannot be read, and its peers learn of it soon."""
        self.lives.pop(agent_id).die()

    def delay_ns(self, bounds: tuple[int, int]) -> int:
        return self.rng.randint(*bounds)

    def close(self) -> None:
        self.scheduler.close()


class MemoryRuntime:
    """Implements `Runtime` in virtual time."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._is_closed = False

    @property
    def clock(self) -> Clock:
        return self._scheduler.clock

    def submit(self, task: Callable[[], None]) -> None:
        if not self._is_closed:
            self._scheduler.spawn(task)

    def serve(self, task: Callable[[], None]) -> None:
        self.submit(task)

    def call_at(self, at_ns: int, task: Callable[[], None]) -> Timer:
        timer = Timer(task)
        self._scheduler.call_at(at_ns, timer.fire)
        return timer

    def wait(self, future: Future[Any], timeout_s: float | None) -> None:
        self._run(future.done, timeout_s)

    def receive(self, inbox: Inbox, timeout_s: float | None) -> Notification:
        found: list[Notification] = []

        def has_come() -> bool:
            notification = inbox.poll()
            if notification is not None:
                found.append(notification)
            return notification is not None

        try:
            self._run(has_come, timeout_s)
        except TimeoutError:
            raise TransferTimeout(f"no notification came within {timeout_s} s") from None
        return found[0]

    def _run(self, condition: Callable[[], bool], timeout_s: float | None) -> None:
        """Raises: TimeoutError, also if nothing is left that could happen."""
        end_ns = None if timeout_s is None else self.clock.now_ns() + int(timeout_s * 1e9)
        while not condition():
            if end_ns is not None and self.clock.now_ns() >= end_ns:
                raise TimeoutError
            if not self._scheduler.step():
                raise TimeoutError

    def close(self) -> None:
        self._is_closed = True


class MemoryBackend:
    """Implements `Backend` for one agent."""

    name = "memory"

    def __init__(self, network: MemoryNetwork) -> None:
        self._network = network
        self.is_alive = True
        self.agent: Agent
        self.guests: set[Guest] = set()
        self.channels: set[MemoryChannel] = set()  # of this agent's sessions

    def start(self, services: Services) -> BackendCard:
        assert isinstance(services, Agent)
        self.agent = services
        earlier = self._network.lives.get(services.card.agent_id)
        if earlier is not None:
            earlier.die()
        self._network.lives[services.card.agent_id] = self
        return BackendCard(self.name, {"network": str(id(self._network))})

    def moves(self, kind: str) -> bool:
        return kind == "host"

    def why_not(self, memory: BlockMemory) -> str | None:
        return None if isinstance(memory, HostBlocks) else f"{memory.kind} memory has no bytes that this backend could copy"

    def attach(self, region: Region) -> None:
        """Nothing to do."""

    def detach(self, region: Region) -> None:
        """Nothing to do."""

    def judge(self, mine: AgentCard, theirs: AgentCard) -> Judgement:
        here, there = mine.backend(self.name), theirs.backend(self.name)
        if here is None or there is None or here.facts != there.facts:
            return Judgement(None, f"agent {theirs.agent_id} is not on this network in this process")
        return Judgement(RANK, "both are on one network in this process")

    def open_channel(self, theirs: AgentCard, session_id: bytes, deadline_ns: int) -> Channel:
        peer = self.peer(theirs)
        greeting = Greeting("control", session_id, theirs.agent_id, theirs.epoch, self.agent.card_with_none(), b"", b"")
        guest = Guest(greeting, peer.agent.lending)
        peer.guests.add(guest)
        channel = MemoryChannel(self._network, self, peer, guest)
        self.channels.add(channel)
        return channel

    def connect(self, theirs: AgentCard, session_id: bytes) -> MemoryLink:
        return MemoryLink(self._network, self, theirs)

    def peer(self, theirs: AgentCard) -> MemoryBackend:
        """The present life of another agent. Raises: PeerLost, StaleDescriptor."""
        peer = self._network.lives.get(theirs.agent_id)
        if peer is None or not peer.is_alive:
            raise PeerLost(f"agent {theirs.agent_id} is gone")
        if peer.agent.card_with_none().epoch != theirs.epoch:
            raise StaleDescriptor(f"agent {theirs.agent_id} of epoch {theirs.epoch} is gone; there is a later life of it")
        return peer

    def serve(self, wire: Wire, greeting: Greeting) -> None:
        raise AssertionError("there are no connections in memory")

    def die(self) -> None:
        """Nothing of this life is heard of any more."""
        self.is_alive = False
        soon_ns = self._network.scheduler.clock.now_ns() + self._network.faults.message_delay_ns[1]
        for channel in list(self.channels):
            self._network.scheduler.call_at(soon_ns, channel.guest.leave)
        for life in self._network.lives.values():
            for channel in life.channels:
                if channel.peer is self:
                    self._network.scheduler.call_at(soon_ns, channel.lose)

    def close(self) -> None:
        if self.is_alive:
            self._network.lives.pop(self.agent.card_with_none().agent_id, None)
            self.die()


class MemoryChannel:
    """Implements `Channel`: messages arrive in order, some time later, unless an end has died."""

    def __init__(self, network: MemoryNetwork, own: MemoryBackend, peer: MemoryBackend, guest: Guest) -> None:
        self._network = network
        self._own = own
        self.peer = peer
        self.guest = guest
        self.is_lost = False
        self._last_ns = 0

    def take(self, lease_id: str) -> None:
        self._send(Take(lease_id))

    def release(self, lease_id: str) -> None:
        self._send(Release(lease_id))

    def notify(self, payload: bytes, timeout_s: float) -> None:
        notification = Notification(self._own.agent.card_with_none(), payload, _Reply(self))
        self._later(lambda: self.peer.agent.inbox.deliver(notification))

    def answer(self, payload: bytes) -> None:
        """The other way."""
        notification = Notification(self.peer.agent.card_with_none(), payload, _Reply(self))
        self._later(lambda: self._own.agent.inbox.deliver(notification))

    def _send(self, frame: Frame) -> None:
        self._later(lambda: self._arrive(frame))

    def _arrive(self, frame: Frame) -> None:
        if not self.guest.handle(frame):
            self.guest.leave()
            self.peer.guests.discard(self.guest)

    def _later(self, deliver: Callable[[], None]) -> None:
        if self.is_lost:
            raise PeerLost("the peer is gone")
        delay_ns = self._network.delay_ns(self._network.faults.message_delay_ns)
        self._last_ns = max(self._last_ns + 1, self._network.scheduler.clock.now_ns() + delay_ns)
        own, peer = self._own, self.peer
        self._network.scheduler.call_at(self._last_ns, lambda: deliver() if own.is_alive and peer.is_alive else None)

    def lose(self) -> None:
        self.is_lost = True

    def close(self) -> None:
        if not self.is_lost and self in self._own.channels:
            self._send(Goodbye())
        self._own.channels.discard(self)


class _Reply:
    def __init__(self, channel: MemoryChannel) -> None:
        self._channel = channel

    def send(self, payload: bytes, timeout_s: float) -> None:
        self._channel.answer(payload)


class MemoryLink:
    """Implements `Link`. Each block is copied in two halves with time in between, so that whoever changes it meanwhile is found out."""

    lane_count = 2

    def __init__(self, network: MemoryNetwork, own: MemoryBackend, theirs: AgentCard) -> None:
        self._network = network
        self._own = own
        self._theirs = theirs
        self._is_closed = False

    def read(self, job: Job) -> None:
        source = self._own.peer(self._theirs).agent.region(job.remote.region_id)
        for place in self._order(job):
            if not self._reaches(job):
                return
            expected = job.remote_generations[place]
            job.verdicts[place] = self._copy(source, job.remote_ids[place], expected, job.local, job.local_ids[place], None)

    def write(self, job: Job) -> None:
        target = self._own.peer(self._theirs).agent.region(job.remote.region_id)
        for place in self._order(job):
            if not self._reaches(job):
                return
            target_id, granted = job.remote_ids[place], job.remote_generations[place]
            local_id = job.local_ids[place]
            present = job.local.host_blocks.generation_words[local_id]
            job.verdicts[place] = self._copy(job.local, local_id, present, target, target_id, granted)

    def _order(self, job: Job) -> list[int]:
        places = list(range(len(job.verdicts)))
        if self._network.faults.reorder:
            self._network.rng.shuffle(places)
        return places

    def _reaches(self, job: Job) -> bool:
        """Time passes, and what may go wrong before a block. False: given up. Raises: PeerLost, TransferTimeout."""
        network, faults = self._network, self._network.faults
        if network.rng.random() < faults.stall:
            while not job.stop[0]:
                self._check(job)
                network.scheduler.sleep(1_000_000)
        network.scheduler.sleep(network.delay_ns(faults.block_delay_ns))
        if network.rng.random() < faults.lose:
            raise PeerLost("the connection broke")
        self._check(job)
        return not job.stop[0]

    def _check(self, job: Job) -> None:
        if self._is_closed or not self._own.is_alive:
            raise PeerLost("the session has ended")
        self._own.peer(self._theirs)
        if self._network.scheduler.clock.now_ns() >= job.deadline_ns:
            raise TransferTimeout("the deadline passed")

    def _copy(self, source: Region, source_id: int, expected: int, target: Region, target_id: int, granted: int | None) -> Verdict:
        start, end = source.host_blocks, target.host_blocks
        user = object()
        try:
            source.enter(user)
            target.enter(user)
            width = target.memory.block_bytes
            if not _is_as_told(start, source_id, expected) or not _is_as_told(end, target_id, granted):
                return Verdict.STALE
            from_block = start.blocks[source_id * width : (source_id + 1) * width]
            to_block = end.blocks[target_id * width : (target_id + 1) * width]
            half = width // 2
            to_block[:half] = from_block[:half]
            self._network.scheduler.sleep(self._network.delay_ns(self._network.faults.block_delay_ns))
            to_block[half:] = from_block[half:]
            sent = xxh3_64_intdigest(from_block)
            if self._network.rng.random() < self._network.faults.corrupt:
                to_block[self._network.rng.randrange(width)] ^= 0x40
            if not _is_as_told(start, source_id, expected) or not _is_as_told(end, target_id, granted):
                return Verdict.STALE
            return Verdict.DONE if xxh3_64_intdigest(to_block) == sent else Verdict.CORRUPT
        except HandleReleased:
            return Verdict.STALE
        finally:
            source.leave(user)
            target.leave(user)

    def close(self) -> None:
        self._is_closed = True


def _is_as_told(memory: HostBlocks, block_id: int, expected: int | None) -> bool:
    return expected is None or memory.generation_words[block_id] == expected
