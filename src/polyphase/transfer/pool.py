"""The owner's side of a block pool: KV blocks in anonymous shared memory that other processes on this host can be given to read.

The memory has no name, so nothing is left behind by a killed process; it cannot change its size, and nobody but its owner can map it
writable. Each block has a generation that the owner renews before it puts other content into the block: a reader compares before and
after its copy, and so a lease that ran out while somebody read is noticed, not served as wrong tokens.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from collections.abc import Callable, Sequence

from polyphase.core.errors import ConfigurationError
from polyphase.transfer.layout import PoolLayout
from polyphase.transfer.memory import allocate_pages, available_memory_bytes, create_anonymous_file, seal

FIRST_GENERATION = 1


class SharedPool:
    """`block_count` blocks of `block_bytes` bytes, in pages that exist already. One thread at a time may call `renew`."""

    kind = "host"

    def __init__(self, layout: PoolLayout, fd: int, mapping: mmap.mmap) -> None:
        self.pool_id = layout.pool_id
        self.block_count = layout.block_count
        self.block_bytes = layout.block_bytes
        self.fd = fd
        self._mapping = mapping
        self._whole = memoryview(mapping)
        start = layout.blocks_offset
        self.blocks = self._whole[start : start + self.block_count * self.block_bytes]
        self.generation_words = self._whole[layout.generations_offset : layout.generations_offset + 8 * self.block_count].cast("Q")
        self._is_closed = False

    @classmethod
    def create(cls, block_count: int, block_bytes: int, on_progress: Callable[[int, int], None] | None = None) -> SharedPool:
        """Allocate and pre-fault a pool; all blocks are zero.

        Args:
            on_progress: called with (bytes done, bytes in all) while pages are allocated.

        Raises: ConfigurationError if the sizes are not positive or the memory is not there.
        Cost: about 0.5 s a GB.
        Owner: the caller, by `close`.
        """
        if block_count < 1 or block_bytes < 1:
            raise ConfigurationError(f"a block pool needs at least one block of one byte, not {block_count} of {block_bytes}")
        layout = PoolLayout(secrets.token_hex(16), block_count, block_bytes)
        wanted = layout.total_bytes
        available = available_memory_bytes()
        if available is not None and wanted > available:
            raise ConfigurationError(_does_not_fit(wanted, f"{available:,} bytes ({available / 2**30:.2f} GiB) are available"))
        try:
            fd = create_anonymous_file(f"polyphase-kv-{layout.pool_id[:8]}", wanted)
        except OSError as error:
            raise ConfigurationError(_does_not_fit(wanted, error.strerror or str(error))) from error
        try:
            allocate_pages(fd, wanted, on_progress)
            mapping = mmap.mmap(fd, wanted, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        except OSError as error:
            os.close(fd)
            raise ConfigurationError(_does_not_fit(wanted, error.strerror or str(error))) from error
        except BaseException:
            os.close(fd)
            raise
        header = layout.pack()
        mapping[: len(header)] = header
        seal(fd)
        pool = cls(layout, fd, mapping)
        for block_id in range(block_count):
            pool.generation_words[block_id] = FIRST_GENERATION
        return pool

    def generations(self, block_ids: Sequence[int]) -> list[int]:
        """Present generation of each block: what an offer of these blocks must carry."""
        generations = self.generation_words
        return [generations[block_id] for block_id in block_ids]

    def renew(self, block_ids: Sequence[int]) -> None:
        """Give the blocks new generations, so that earlier offers of them cannot be read any more.

        To be called before the first byte of a block changes, by the thread that changes it or with a lock in between.
        """
        generations = self.generation_words
        for block_id in block_ids:
            generations[block_id] += 1

    def close(self) -> None:
        """Give the memory back. Views of `blocks` that others still hold (tensors) keep it alive until they go. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        for view in (self.blocks, self.generation_words, self._whole):
            with contextlib.suppress(BufferError):
                view.release()
        with contextlib.suppress(BufferError):
            self._mapping.close()
        os.close(self.fd)

    def __enter__(self) -> SharedPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _does_not_fit(wanted: int, reason: str) -> str:
    return (
        f"the KV block pool wants {wanted:,} bytes ({wanted / 2**30:.2f} GiB) of memory, but {reason}; "
        "choose fewer KV bytes (--kv-bytes) or a shorter context"
    )
