"""Sequences over the block pool: a prefix hit on the way in, growth while tokens come, names for what is computed.

tokens    | hit            | to compute        | not known yet
blocks    [ b4  b7  b1 ]   [ b9  b12  b13 ]      none
           retained          allocated
           named             named one by one as they fill up
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence

from polyphase.core.ids import BlockId
from polyphase.kv.chain import BlockNames, PrefixChain
from polyphase.kv.pool import BlockPool


class SequenceBlocks:
    """One sequence's block table. `block_ids` is int64 in one piece of memory, so that a batch is packed without a loop."""

    __slots__ = ("block_ids", "chain", "named_count")

    def __init__(self, chain: BlockNames) -> None:
        self.chain = chain
        self.block_ids: array[int] = array("q")
        self.named_count = 0  # leading blocks that need no name any more

    def ids(self) -> list[BlockId]:
        return [BlockId(i) for i in self.block_ids]


class PrefixCache:
    """Owner: a `SequenceBlocks` that was admitted is closed or detached exactly once before it is admitted again."""

    def __init__(self, pool: BlockPool, block_size: int, namespace: str) -> None:
        self.pool = pool
        self.block_size = block_size
        self._namespace = namespace

    def blocks_for(self, token_count: int) -> int:
        return -(-token_count // self.block_size)

    def open(self, token_ids: Sequence[int], salt: str | None) -> SequenceBlocks:
        """Names the sequence's full blocks; takes none."""
        chain = PrefixChain(self.block_size, self._namespace, salt)
        chain.extend(token_ids)
        return SequenceBlocks(chain)

    def uncached_count(self, blocks: SequenceBlocks, token_count: int) -> int:
        """Of `token_count` known tokens of a sequence that waits, those that it would have to compute if it were admitted now.

        An estimate, made without walking the chain: prefixes are forgotten from their end, so what is cached is nearly always a
        leading part of it. Cost: O(log blocks).
        """
        keys = blocks.chain.keys
        limit = min(len(keys), (token_count - 1) // self.block_size)
        return token_count - self.block_size * bisect_left(range(limit), True, key=lambda place: not self.pool.holds(keys[place]))

    def shared_beyond(self, blocks: SequenceBlocks, cached_count: int, other: SequenceBlocks, other_token_count: int) -> int:
        """Full blocks that both sequences begin with, the first `cached_count` tokens left out, where the other one is not named yet.

        Cost: O(log blocks): equal keys at one place mean equal prefixes.
        """
        keys, other_keys, first = blocks.chain.keys, other.chain.keys, cached_count // self.block_size
        limit = min(len(keys), len(other_keys), other_token_count // self.block_size)
        if first < other.named_count or first >= limit or keys[first] != other_keys[first]:
            return 0
        return bisect_left(range(first, limit), True, key=lambda place: keys[place] != other_keys[place])

    def admit(self, blocks: SequenceBlocks, token_count: int, spare_count: int) -> int | None:
        """Take blocks for all `token_count` known tokens, cached ones first.

        At least one token is left to compute, because its logits are needed.

        Args:
            spare_count: blocks that must stay available afterwards.

        Returns: tokens found in the cache; None if the blocks do not suffice, and then nothing was taken.
        """
        hit = self.pool.match(blocks.chain.keys[: (token_count - 1) // self.block_size])
        fresh_count = self.blocks_for(token_count) - len(hit)
        if fresh_count + spare_count > self.pool.available_count - self.pool.idle_among(hit):
            return None
        self.pool.retain(hit)
        blocks.block_ids = array("q", hit + self.pool.allocate(fresh_count))
        blocks.named_count = len(hit)
        return len(hit) * self.block_size

    def grow(self, blocks: SequenceBlocks, token_count: int) -> bool:
        """Make room for `token_count` tokens. Returns False, having taken nothing, if the pool is exhausted."""
        missing = self.blocks_for(token_count) - len(blocks.block_ids)
        if missing <= 0:
            return True
        if missing > self.pool.available_count:
            return False
        blocks.block_ids.extend(self.pool.allocate(missing))
        return True

    def commit(self, blocks: SequenceBlocks, token_ids: Sequence[int], computed_count: int) -> None:
        """Name the blocks that are full now that the KV of `computed_count` tokens is in place."""
        full_count = computed_count // self.block_size
        if full_count <= blocks.named_count:
            return
        chain = blocks.chain
        chain.extend(token_ids)
        fresh = slice(blocks.named_count, full_count)
        self.pool.name_all(blocks.block_ids[fresh], chain.keys[fresh], chain.hashes[fresh])
        blocks.named_count = full_count

    def detach(self, blocks: SequenceBlocks) -> list[BlockId]:
        """Give the references to the caller, who releases them."""
        block_ids = blocks.ids()
        blocks.block_ids = array("q")
        blocks.named_count = 0
        return block_ids

    def close(self, blocks: SequenceBlocks) -> None:
        """Release all blocks; what is named stays cached until it is evicted. A second call does nothing."""
        self.pool.release(self.detach(blocks))
