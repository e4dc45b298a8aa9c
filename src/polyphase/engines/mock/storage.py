"""The memory of a mock engine's blocks: none, or a few bytes for each that other workers can fetch as they would real ones."""

from __future__ import annotations

from collections.abc import Sequence

from polyphase.engines.interface import BlockSource
from polyphase.transfer import HostMemory, SharedPool
from polyphase.wire.kv import KvLayout

BLOCK_BYTES = 8  # what is really kept of a block


class MockStorage:
    """With `is_shared`, leases, generations and descriptors go the way of real blocks; only the bytes are few."""

    def __init__(self, layout: KvLayout, block_count: int, *, is_shared: bool) -> None:
        self.layout = layout
        self.block_count = block_count
        self.shared = SharedPool.create(block_count, layout.block_bytes) if is_shared else None

    def read_from(self, source: BlockSource, block_ids: list[int], generations: list[int], into: Sequence[int]) -> bytes:
        if self.shared is not None:
            return source.read_blocks(block_ids, generations, self.shared, into)
        staging = HostMemory(bytearray(len(block_ids) * self.layout.block_bytes), self.layout.block_bytes)
        return source.read_blocks(block_ids, generations, staging, range(len(block_ids)))

    def zero(self, block_ids: Sequence[int]) -> None:
        if self.shared is not None:
            for block_id in block_ids:
                self.shared.blocks[block_id * self.layout.block_bytes : (block_id + 1) * self.layout.block_bytes] = bytes(
                    self.layout.block_bytes
                )

    def close(self) -> None:
        if self.shared is not None:
            self.shared.close()
