"""How one worker tells another where the KV of a prompt is to be had, and for how long.

KvOffer       blocks of an engine of our own: the reader's agent copies them
EngineOffer   KV of a stock engine, which brings it to another engine of its kind by itself: only that one's own words travel
"""

from __future__ import annotations

from typing import Any

import msgspec

from polyphase.wire.layout import KvLayout
from polyphase.wire.transfer import AgentCard, RegionCard

__all__ = ["EngineOffer", "KvLayout", "KvOffer", "KvPart", "Offer"]


class KvOffer(msgspec.Struct, frozen=True, tag="blocks"):
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


class EngineOffer(msgspec.Struct, frozen=True, tag="engine"):
    """What a prefill leg left at an engine that moves KV itself: `params`, in that engine's words, which nobody in between reads.

    Good for one reader: whoever may have begun with it has used it up. Workers take it whose card has the same `offer_kind`; the others
    compute the prompt. It may come before the prompt is computed, by engines whose legs have to run at the same time.
    """

    worker_id: str
    epoch: int
    endpoint: str  # request channel of the worker that made it
    lease_id: str
    expires_at_ns: int  # when the engine gives up what nobody fetched; CLOCK_MONOTONIC of its host
    kind: str
    params: dict[str, Any]  # as JSON has them
    token_count: int  # of the prompt


Offer = KvOffer | EngineOffer


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
