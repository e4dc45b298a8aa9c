"""The first page of a block pool's shared memory, and where its parts lie.

    | header, one page | generation of each block, uint64, whole pages | block 0 | block 1 | ...
    0                  4096                                            blocks_offset

The generations lie beside the blocks, so that a reader can tell that a block was given to somebody else even if its owner is dead.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from polyphase.core.errors import TransferError

PAGE_BYTES = 4096
MAGIC = b"PPKVPOOL"
VERSION = 1
_HEADER = struct.Struct("<8sI32sQQ")


@dataclass(frozen=True, slots=True)
class PoolLayout:
    """Sizes of a pool; all offsets follow from them."""

    pool_id: str  # 32 hexadecimal digits
    block_count: int
    block_bytes: int

    @property
    def generations_offset(self) -> int:
        return PAGE_BYTES

    @property
    def blocks_offset(self) -> int:
        return PAGE_BYTES + _whole_pages(8 * self.block_count)

    @property
    def total_bytes(self) -> int:
        return self.blocks_offset + _whole_pages(self.block_count * self.block_bytes)

    def pack(self) -> bytes:
        return _HEADER.pack(MAGIC, VERSION, self.pool_id.encode("ascii"), self.block_count, self.block_bytes)

    @classmethod
    def unpack(cls, header: bytes) -> PoolLayout:
        """Raises: TransferError if `header` does not begin a pool of this version."""
        if len(header) < _HEADER.size:
            raise TransferError(f"the shared memory holds {len(header)} bytes of header where a block pool has {_HEADER.size}")
        magic, version, pool_id, block_count, block_bytes = _HEADER.unpack_from(header)
        if magic != MAGIC:
            raise TransferError(f"the shared memory is not a block pool: it begins with {magic!r} instead of {MAGIC!r}")
        if version != VERSION:
            raise TransferError(f"the block pool has format version {version}, this process reads version {VERSION}")
        return cls(pool_id.decode("ascii", "replace"), block_count, block_bytes)


def _whole_pages(byte_count: int) -> int:
    return -(-byte_count // PAGE_BYTES) * PAGE_BYTES
