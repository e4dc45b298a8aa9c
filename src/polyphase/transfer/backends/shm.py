"""Agents on one host: the reader maps the other's pool and copies, with no word to its owner and no thread of it.

Only memory of a `SharedPool` can be reached; its descriptor is handed over a Unix socket (SCM_RIGHTS) and mapped read-only, which the
seals of the memory enforce. A write hands the writer's pool to the owner of the target, who copies.
"""

from __future__ import annotations

import os
import threading

from polyphase.core.errors import PolyphaseError, StaleDescriptor, TransferRefused, WireError
from polyphase.transfer.backends.interface import Job, Judgement, Services
from polyphase.transfer.blocks import BlockMemory
from polyphase.transfer.channel import Channel
from polyphase.transfer.copying import Copy, copy_blocks
from polyphase.transfer.doors import why_not_by_unix
from polyphase.transfer.opened import OpenedPool
from polyphase.transfer.pool import SharedPool
from polyphase.transfer.pulling import PullJob, ask_to_pull
from polyphase.transfer.region import Region
from polyphase.transfer.shelf import Shelf
from polyphase.transfer.wire import Wire, expect, refusal_of
from polyphase.wire.transfer import AgentCard, BackendCard, Greeting, Open, Opened, Pull, RegionCard, Verdicts

RANK = 10.0


class ShmBackend:
    """Implements `Backend`."""

    name = "shm"

    def __init__(self, lane_count: int = 1) -> None:
        """`lane_count`: threads that copy one large transfer; one is enough to fill most of a memory channel."""
        self._lane_count = lane_count

    def start(self, services: Services) -> BackendCard:
        self._services = services
        if not hasattr(os, "memfd_create"):
            raise TransferRefused("this system has no anonymous shared memory that can be sealed (memfd)")
        return BackendCard(self.name)

    def moves(self, kind: str) -> bool:
        return kind == "host"

    def why_not(self, memory: BlockMemory) -> str | None:
        return None if isinstance(memory, SharedPool) else "only the memory of a SharedPool can be mapped by another process"

    def attach(self, region: Region) -> None:
        """Nothing to do: the pool is there."""

    def detach(self, region: Region) -> None:
        """Nothing to do: who has mapped the pool keeps its memory, and its generations tell what it is worth."""

    def judge(self, mine: AgentCard, theirs: AgentCard) -> Judgement:
        reason = why_not_by_unix(mine, theirs)
        return Judgement(RANK, "both run on this host") if reason is None else Judgement(None, reason)

    def open_channel(self, theirs: AgentCard, session_id: bytes, deadline_ns: int) -> Channel:
        return self._services.open_socket_channel(theirs, session_id, deadline_ns)

    def connect(self, theirs: AgentCard, session_id: bytes) -> ShmLink:
        shelf = Shelf(lambda by_ns: self._services.dial(theirs, self.name, session_id, by_ns), f"agent {theirs.agent_id}")
        return ShmLink(shelf, self._services, self._lane_count)

    def serve(self, wire: Wire, greeting: Greeting) -> None:
        frame = wire.receive()
        try:
            match frame:
                case Open(region_id):
                    wire.send(Opened(), (self._pool(region_id).fd,))
                case Pull():
                    wire.send(self._pull(wire, frame))
                case _:
                    raise WireError(f"a {type(frame).__name__} frame is no request to shared memory")
        except PolyphaseError as error:
            if wire.is_closed:
                raise
            wire.send(refusal_of(error))

    def _pool(self, region_id: str) -> SharedPool:
        memory = self._services.region(region_id).memory
        if not isinstance(memory, SharedPool):
            raise TransferRefused(f"region {region_id} does not lie in shared memory")
        return memory

    def _pull(self, wire: Wire, pull: Pull) -> Verdicts:
        """Copy what the peer writes; into blocks that still are what the peer was told."""
        fd = wire.take_fd()
        try:
            opened = wire.kept.get(pull.source.region_id)
            if not isinstance(opened, OpenedPool):
                opened = wire.kept[pull.source.region_id] = OpenedPool.from_fd(fd, pull.source)
        finally:
            os.close(fd)
        pulled = PullJob(self._services, pull)
        job = pulled.job
        pulled.region.enter(job)
        timer = self._services.call_at(job.deadline_ns, lambda: job.stop.__setitem__(0, 1))
        try:
            _copy(job, opened)
        finally:
            timer.cancel()
            pulled.region.leave(job)
        return pulled.verdicts()

    def close(self) -> None:
        """Nothing runs."""


class ShmLink:
    """Implements `Link`. Owner: the session; mapped pools go with it."""

    def __init__(self, shelf: Shelf, services: Services, lane_count: int) -> None:
        self.lane_count = lane_count
        self._shelf = shelf
        self._services = services
        self._pools: dict[str, OpenedPool] = {}
        self._opening = threading.Lock()
        self._is_closed = False

    def read(self, job: Job) -> None:
        pool = self._open(job.remote, job.deadline_ns)
        _copy(job, pool)

    def _open(self, region: RegionCard, deadline_ns: int) -> OpenedPool:
        pool = self._pools.get(region.region_id)
        if pool is not None:
            return pool
        with self._opening:
            pool = self._pools.get(region.region_id)
            if pool is None:
                if self._is_closed:
                    raise StaleDescriptor("the session has ended")
                with self._shelf.wire(deadline_ns) as wire:
                    wire.send(Open(region.region_id))
                    expect(wire.receive(), Opened)
                    fd = wire.take_fd()
                try:
                    pool = self._pools[region.region_id] = OpenedPool.from_fd(fd, region)
                finally:
                    os.close(fd)
                self._services.submit(pool.map_pages)
        return pool

    def write(self, job: Job) -> None:
        memory = job.local.memory
        if not isinstance(memory, SharedPool):
            raise TransferRefused("only blocks of a SharedPool can be written through shared memory")
        with self._shelf.wire(job.deadline_ns) as wire:
            ask_to_pull(wire, job, self._services, (memory.fd,))

    def close(self) -> None:
        with self._opening:
            self._is_closed = True
            for pool in self._pools.values():
                pool.close()
            self._pools.clear()
        self._shelf.close()


def _copy(job: Job, pool: OpenedPool) -> None:
    copy_blocks(
        Copy(
            target=job.local.host_blocks.blocks,
            target_ids=job.local_ids,
            source=pool.blocks,
            source_ids=job.remote_ids,
            block_bytes=pool.block_bytes,
            generations=pool.generation_words,
            expected=job.remote_generations,
            verdicts=job.verdicts,
            stop=job.stop,
        )
    )
