"""Handing over: offers of finished prompts' blocks, the leases that keep them, and generations that end with re-use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyphase.core.errors import KvError
from polyphase.core.ids import BlockId, ContentKey
from polyphase.engines.batching.storage import Generations
from polyphase.kv import BlockPool, LeaseTable
from polyphase.wire.kv import KvLayout, KvOffer, KvPart
from polyphase.wire.transfer import AgentCard


@dataclass(frozen=True, slots=True)
class OfferOrigin:
    """What is the same in all offers of one worker's life."""

    worker_id: str
    epoch: int
    endpoint: str
    agent: AgentCard
    region_id: str


class BlockExports:
    """Owner: the references of offered blocks are held here until their lease is released or runs out."""

    def __init__(self, pool: BlockPool, shared: Generations | None, lease_ns: int) -> None:
        self.leases = LeaseTable()
        self.origin: OfferOrigin | None = None
        self._pool = pool
        self._shared = shared
        self._lease_ns = lease_ns
        self._offered: set[int] = set()  # blocks whose present generation somebody knows
        self._lease_of: dict[str, str] = {}  # request id → lease id
        self._request_of: dict[str, str] = {}
        self._counter = 0

    @property
    def can_offer(self) -> bool:
        return self._shared is not None and self.origin is not None

    @property
    def has_offered(self) -> bool:
        """Whether anybody may know the present generation of a block."""
        return bool(self._offered)

    def offer(self, request_id: str, block_ids: list[BlockId], token_count: int, now_ns: int) -> KvOffer:
        """Keep the blocks, whose references pass to this object, under a new lease."""
        if self._shared is None or self.origin is None:
            raise KvError("blocks are offered although no other process could read them")
        self._counter += 1
        lease_id = f"{request_id}#{self._counter}"
        lease = self.leases.acquire(lease_id, block_ids, now_ns + self._lease_ns)
        self._lease_of[request_id] = lease_id
        self._request_of[lease_id] = request_id
        self._offered.update(block_ids)
        return KvOffer(
            worker_id=self.origin.worker_id,
            epoch=self.origin.epoch,
            endpoint=self.origin.endpoint,
            lease_id=lease_id,
            expires_at_ns=lease.expires_at_ns,
            agent=self.origin.agent,
            region_id=self.origin.region_id,
            block_ids=list(block_ids),
            generations=self._shared.generations(block_ids),
            token_count=token_count,
        )

    def show(self, first_block: int, block_ids: Sequence[int]) -> KvPart:
        """Tell where full blocks of a running sequence lie, which keeps them, or cached ones, which nobody keeps.

        Their generations end with re-use, as those of offers do.
        """
        if self._shared is None or self.origin is None:
            raise KvError("blocks are shown although no other process could read them")
        self._offered.update(block_ids)
        return KvPart(first_block, list(block_ids), self._shared.generations(block_ids), self.origin.agent, self.origin.region_id)

    def find(self, first_block: int, keys: Sequence[ContentKey]) -> KvPart:
        """Show what is cached of these blocks of a prefix, and see to it that they are evicted last."""
        held = self._pool.match(keys)
        self._pool.retain(held)
        self._pool.release(held)
        return self.show(first_block, held)

    def release(self, lease_id: str) -> bool:
        """Returns whether there was such a lease."""
        lease = self.leases.release(lease_id)
        if lease is None:
            return False
        self._forget(lease_id)
        self._pool.release(lease.block_ids)
        return True

    def release_request(self, request_id: str) -> bool:
        """End the lease on the blocks of a request that was handed over."""
        lease_id = self._lease_of.get(request_id)
        return lease_id is not None and self.release(lease_id)

    def expire(self, now_ns: int) -> int:
        """End the leases whose time is up; returns how many."""
        ended = self.leases.expire(now_ns)
        for lease in ended:
            self._forget(lease.lease_id)
            self._pool.release(lease.block_ids)
        return len(ended)

    def before_writing(self, block_ids: Sequence[int]) -> None:
        """These blocks are about to change: whoever still has an old offer of them must notice."""
        if self._offered and self._shared is not None:
            known = self._offered.intersection(block_ids)
            self._shared.renew(sorted(known))
            self._offered -= known

    def _forget(self, lease_id: str) -> None:
        request_id = self._request_of.pop(lease_id)
        if self._lease_of.get(request_id) == lease_id:
            del self._lease_of[request_id]


def can_use(offer: KvOffer, layout: KvLayout, now_ns: int) -> bool:
    """Whether the offered blocks are of our kind, as many as they must be, and still kept."""
    block_count = -(-offer.token_count // layout.block_size)
    return (
        offer.layout == layout
        and offer.token_count > 0
        and len(offer.block_ids) == len(offer.generations) == block_count
        and offer.expires_at_ns > now_ns
    )
