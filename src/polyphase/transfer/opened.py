"""Another process's block pool, mapped read-only."""

from __future__ import annotations

import contextlib
import mmap
import os

from polyphase.core.errors import TransferError
from polyphase.transfer.layout import PAGE_BYTES, PoolLayout
from polyphase.transfer.memory import can_shrink
from polyphase.wire.transfer import RegionCard

MADV_POPULATE_READ = 22  # Source: linux/mman.h
MAP_CHUNK_BYTES = 64 << 20


class OpenedPool:
    """`blocks` and `generation_words` of somebody else. Any thread may read; the owner's death does not disturb a reader."""

    def __init__(self, layout: PoolLayout, mapping: mmap.mmap) -> None:
        self.pool_id = layout.pool_id
        self.block_count = layout.block_count
        self.block_bytes = layout.block_bytes
        self._mapping = mapping
        self._whole = memoryview(mapping)
        start = layout.blocks_offset
        self.blocks = self._whole[start : start + self.block_count * self.block_bytes]
        words = self._whole[layout.generations_offset : layout.generations_offset + 8 * self.block_count]
        self.generation_words = words.cast("Q")

    @classmethod
    def from_fd(cls, fd: int, region: RegionCard) -> OpenedPool:
        """Map the pool behind `fd`, which stays the caller's.

        Raises: TransferError if this is not the described pool, or its owner could cut it short under the reader.
        """
        wanted = PoolLayout(region.region_id, region.block_count, region.block_bytes)
        try:
            size = os.fstat(fd).st_size
            found = PoolLayout.unpack(os.pread(fd, PAGE_BYTES, 0))
        except OSError as error:
            raise TransferError(f"block pool {region.region_id} cannot be read: {error.strerror}") from error
        if found != wanted:
            raise TransferError(f"the shared memory holds another block pool than offered: {found} instead of {wanted}")
        if size < wanted.total_bytes or can_shrink(fd):
            raise TransferError(f"block pool {region.region_id} is {size} bytes long and not sealed at {wanted.total_bytes}")
        try:
            mapping = mmap.mmap(fd, wanted.total_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise TransferError(f"block pool {region.region_id} cannot be mapped: {error}") from error
        return cls(wanted, mapping)

    def map_pages(self) -> None:
        """Enter all pages into this process's table, so that the first copies do not stop at each; in pieces, to be run beside other work.

        Cost: 80 ms a GB. Source: MADV_POPULATE_READ of Linux 5.14; elsewhere nothing happens.
        """
        try:
            size = len(self._mapping)
            for start in range(0, size, MAP_CHUNK_BYTES):
                self._mapping.madvise(MADV_POPULATE_READ, start, min(MAP_CHUNK_BYTES, size - start))
        except (OSError, ValueError):  # not this kernel, or closed meanwhile
            return

    def close(self) -> None:
        """Unmap, as soon as no copy in another thread uses it. Idempotent."""
        for view in (self.blocks, self.generation_words, self._whole):
            with contextlib.suppress(BufferError):
                view.release()
        with contextlib.suppress(BufferError):
            self._mapping.close()

    def __enter__(self) -> OpenedPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
