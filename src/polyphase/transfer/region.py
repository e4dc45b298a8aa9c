"""Registered memory: what an agent lets peers read, or has blocks written to."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from polyphase.core.errors import ForeignDescriptor, HandleReleased, KvError
from polyphase.transfer.blocks import BlockMemory, HostBlocks, LocalBlocks, StagedBlocks, checked_ids
from polyphase.transfer.lending import OnEnd
from polyphase.wire.layout import KvLayout, KvShape
from polyphase.wire.transfer import BlockOffer, RegionCard

if TYPE_CHECKING:
    from polyphase.transfer.agent import Agent


class Region:
    """Memory under registration. Owner: the caller of `Agent.register` releases it, and only then the memory."""

    def __init__(
        self,
        agent: Agent,
        memory: BlockMemory,
        layout: KvLayout | None,
        shape: KvShape | None,
        reachable: Sequence[str],
        usable: Sequence[str],
    ) -> None:
        self.agent = agent
        self.memory = memory
        region_id = getattr(memory, "pool_id", None) or secrets.token_hex(16)
        self.card = RegionCard(region_id, memory.kind, memory.block_count, memory.block_bytes, list(reachable), layout, shape)
        self.usable_backends = tuple(usable)  # for this agent's own end of a transfer
        self._host_blocks = memory if isinstance(memory, HostBlocks) else None
        self._staged_blocks = memory if isinstance(memory, StagedBlocks) else None
        self._is_released = False
        self._users: set[object] = set()
        self._lock = threading.Lock()
        self._idle: Future[None] = Future()  # done when it is released and nobody uses it any more

    @property
    def region_id(self) -> str:
        return self.card.region_id

    @property
    def host_blocks(self) -> HostBlocks:
        """Raises: ForeignDescriptor if this is not memory that the processor can address."""
        if self._host_blocks is None:
            raise ForeignDescriptor(f"region {self.region_id} is {self.memory.kind} memory, where host memory is needed")
        return self._host_blocks

    @property
    def sendable_blocks(self) -> HostBlocks | StagedBlocks:
        """Raises: ForeignDescriptor if the blocks cannot be brought where the processor can address them."""
        return self.host_blocks if self._staged_blocks is None else self._staged_blocks

    def blocks(self, block_ids: Iterable[int]) -> LocalBlocks:
        """A list of blocks, checked once. Raises: ForeignDescriptor, HandleReleased."""
        self.check()
        return LocalBlocks(self, checked_ids(block_ids, self.card.block_count, f"region {self.region_id}"))

    def generations(self, block_ids: Sequence[int]) -> list[int]:
        self.check()
        return self.memory.generations(block_ids)

    def renew(self, block_ids: Sequence[int]) -> None:
        """Announce other content for these blocks: earlier offers of them fail from now on.

        Raises: KvError if a block is under lease, HandleReleased.
        """
        self.check()
        pinned = self.agent.lending.pinned(self.region_id)
        if not pinned.isdisjoint(block_ids):
            bad = next(block_id for block_id in block_ids if block_id in pinned)
            raise KvError(f"block {bad} is under lease and must not change before the lease ends")
        self.memory.renew(block_ids)

    def offer(self, block_ids: Iterable[int], ttl_s: float, on_end: OnEnd | None = None) -> BlockOffer:
        """Pin blocks and describe them for a peer, to be read or, as agreed between the two, to be written.

        Args:
            ttl_s: the lease ends after so long at the latest.
            on_end: called once, on any thread, with the lease's id and why it ended; the blocks are free then.

        Raises: ForeignDescriptor, HandleReleased.
        """
        ids = list(self.blocks(block_ids).ids)
        lease_id = self.agent.lend(self, ids, ttl_s, on_end)
        return BlockOffer(
            agent=self.agent.card_with(self.card),
            region_id=self.region_id,
            block_ids=ids,
            generations=self.memory.generations(ids),
            lease_id=lease_id,
            ttl_ms=int(ttl_s * 1000),
        )

    def pinned(self) -> set[int]:
        """Blocks that a lease keeps."""
        return self.agent.lending.pinned(self.region_id)

    def check(self) -> None:
        """Raises: HandleReleased."""
        if self._is_released:
            raise HandleReleased(f"region {self.region_id} was released before")

    def enter(self, user: object) -> None:
        """A job or an answer to a peer begins to use the memory. Raises: HandleReleased."""
        with self._lock:
            self.check()
            self._users.add(user)

    def leave(self, user: object) -> None:
        """Idempotent."""
        with self._lock:
            if user in self._users:
                self._users.discard(user)
                self._settle()

    def _settle(self) -> None:
        if self._is_released and not self._users and not self._idle.done():
            self._idle.set_result(None)

    def release(self) -> None:
        """Unregister. Transfers that use it are cancelled, its leases end; on return this library no longer touches the memory.

        Raises: HandleReleased the second time.
        """
        with self._lock:
            self.check()
            self._is_released = True
            self._settle()
        self.agent.forget_region(self)
        self.agent.runtime.wait(self._idle, None)
        self.agent.detach_region(self)

    @property
    def is_released(self) -> bool:
        return self._is_released

    def __enter__(self) -> Region:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._is_released:
            self.release()
