"""How one worker tells another where KV blocks lie and for how long they may be read."""

from __future__ import annotations

import msgspec

from polyphase.wire.layout import KvLayout
from polyphase.wire.transfer import AgentCard, RegionCard

__all__ = ["KvLayout", "KvOffer", "KvPart"]


class KvOffer(msgspec.Struct, frozen=True):
    """What a prefill worker hands over: blocks that hold the KV of the first `token_count` tokens.

    The blocks stay pinned until the reader gives the lease back to the agent, dies, or the lease runs out at `expires_at_ns`: a time of
    the monotonic clock of whoever holds this, and in a message the time that is left (offer_times.py). Each block's generation changes
    when the block is given to somebody else: a block that has another generation after it was copied must not be used.
    """

    worker_id: str
    epoch: int
    endpoint: str  # request channel of the worker that holds the blocks
    lease_id: str
    expires_at_ns: int
    agent: AgentCard  # its transfer agent, with the region of the blocks
    region_id: str
    block_ids: list[int]
    generations: list[int]
    token_count: int

    @property
    def region(self) -> RegionCard | None:
        return self.agent.region(self.region_id)

    @property
    def layout(self) -> KvLayout | None:
        region = self.region
        return None if region is None else region.layout


class KvPart(msgspec.Struct, frozen=True):
    """Full blocks of a prompt that is still being computed, or of a cached prefix: number `first_block` and following.

    There is no lease on them: they are the running request's own or the cache's, and may be given to others. Their generation tells a
    reader so, who then has nothing. The offer at the end of a prompt names all blocks again, and keeps them.
    """

    first_block: int
    block_ids: list[int]
    generations: list[int]
    agent: AgentCard
    region_id: str
