"""The reader's side of a block pool: maps another process's blocks read-only and copies those that an offer names."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Sequence

from polyphase.core.errors import TransferError
from polyphase.transfer.layout import PAGE_BYTES, PoolLayout
from polyphase.transfer.memory import can_shrink
from polyphase.transfer.pool import check_block_ids
from polyphase.wire.kv import PoolDescriptor

# A copy holds the interpreter lock, so a long run of neighbours is copied in pieces that leave the event loop its turns.
MAX_COPY_BYTES = 4 << 20


class OpenedPool:
    """A mapped pool of somebody else; a `BlockSource`. Any thread may read; the owner's death does not disturb a reader."""

    def __init__(self, layout: PoolLayout, mapping: mmap.mmap) -> None:
        self.pool_id = layout.pool_id
        self.block_count = layout.block_count
        self.block_bytes = layout.block_bytes
        self._mapping = mapping
        self._whole = memoryview(mapping)
        start = layout.blocks_offset
        self._blocks = self._whole[start : start + self.block_count * self.block_bytes]
        self._generations = self._whole[layout.generations_offset : layout.generations_offset + 8 * self.block_count].cast("Q")
        self._order = threading.Lock()

    @classmethod
    def from_fd(cls, fd: int, descriptor: PoolDescriptor) -> OpenedPool:
        """Map the pool behind `fd`, which stays the caller's.

        Raises: TransferError if this is not the described pool, or its owner could cut it short under the reader.
        """
        wanted = PoolLayout(descriptor.pool_id, descriptor.block_count, descriptor.layout.block_bytes)
        try:
            size = os.fstat(fd).st_size
            found = PoolLayout.unpack(os.pread(fd, PAGE_BYTES, 0))
        except OSError as error:
            raise TransferError(f"block pool {descriptor.pool_id} cannot be read: {error.strerror}") from error
        if found != wanted:
            raise TransferError(f"the shared memory holds another block pool than offered: {found} instead of {wanted}")
        if size < wanted.total_bytes or can_shrink(fd):
            raise TransferError(f"block pool {descriptor.pool_id} is {size} bytes long and not sealed at {wanted.total_bytes}")
        try:
            mapping = mmap.mmap(fd, wanted.total_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise TransferError(f"block pool {descriptor.pool_id} cannot be mapped: {error}") from error
        return cls(wanted, mapping)

    def read_blocks(self, block_ids: Sequence[int], generations: Sequence[int], into: memoryview) -> None:
        """Copy whole blocks, in the given order and back to back, into `into` (`len(block_ids) * block_bytes` bytes, writable).

        Raises: TransferError if a block does not have the offered generation before and after the copy, or the arguments do not
            fit each other; what was written to `into` must then not be used.
        Cost: a memory copy at 5 to 10 GB/s; the interpreter lock is held for at most 4 MiB at a time.
        """
        check_block_ids(block_ids, self.block_count)
        if len(generations) != len(block_ids):
            raise TransferError(f"{len(block_ids)} blocks were offered with {len(generations)} generations")
        if into.nbytes != len(block_ids) * self.block_bytes or into.readonly or not into.c_contiguous:
            raise TransferError(f"{len(block_ids)} blocks need {len(block_ids) * self.block_bytes} writable bytes, not {into.nbytes}")
        try:
            self._compare(block_ids, generations)
            with into.cast("B") as target:
                self._copy(block_ids, target)
            self._keep_order()
            self._compare(block_ids, generations)
        except ValueError as error:  # a released view
            raise TransferError(f"block pool {self.pool_id} was closed while it was read") from error

    def _copy(self, block_ids: Sequence[int], target: memoryview) -> None:
        """Neighbours in the pool that are neighbours in the offer are copied in one go."""
        source, width = self._blocks, self.block_bytes
        longest = max(1, MAX_COPY_BYTES // width)
        count = len(block_ids)
        start = 0
        while start < count:
            first = block_ids[start]
            end = start + 1
            while end < count and end - start < longest and block_ids[end] == first + end - start:
                end += 1
            target[start * width : end * width] = source[first * width : (first + end - start) * width]
            start = end

    def _compare(self, block_ids: Sequence[int], generations: Sequence[int]) -> None:
        current = self._generations
        for block_id, generation in zip(block_ids, generations, strict=True):
            if current[block_id] != generation:
                raise TransferError(
                    f"block {block_id} of pool {self.pool_id} was given to somebody else: "
                    f"generation {current[block_id]} instead of the offered {generation}"
                )

    def _keep_order(self) -> None:
        """Processors that reorder reads (ARM) must not look at the generations before the copy is done; locks forbid it."""
        with self._order:
            pass
        with self._order:
            pass

    def close(self) -> None:
        """Unmap. A read that runs in another thread ends in a TransferError. Idempotent."""
        for view in (self._blocks, self._generations, self._whole):
            with contextlib.suppress(BufferError):
                view.release()
        with contextlib.suppress(BufferError):
            self._mapping.close()

    def __enter__(self) -> OpenedPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
