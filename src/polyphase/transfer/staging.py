"""Blocks through a stream from and into any memory: where the processor can address it, from where they lie; else by way of a buffer.

The buffer has a bound whatever a peer asks for, and holds a part of the blocks at a time: a device copies a part in a small fraction of the
time that the stream takes for it.
"""

from __future__ import annotations

from array import array

from polyphase.transfer.blocks import HostBlocks, StagedBlocks
from polyphase.transfer.streaming import receive_blocks, send_blocks
from polyphase.transfer.wire import Wire

STAGING_BYTES = 8 << 20


def send_from(wire: Wire, memory: HostBlocks | StagedBlocks, block_bytes: int, ids: array[int]) -> array[int]:
    """As `send_blocks`. Raises: as that."""
    if isinstance(memory, HostBlocks):
        return send_blocks(wire, memory.blocks, block_bytes, ids)
    sums = array("Q")
    step, staging = _buffer(memory, block_bytes, len(ids))
    for start in range(0, len(ids), step):
        part = ids[start : start + step]
        memory.copy_out(part, staging)
        sums.extend(send_blocks(wire, staging, block_bytes, array("Q", range(len(part)))))
    return sums


def receive_into(wire: Wire, memory: HostBlocks | StagedBlocks, block_bytes: int, ids: array[int]) -> array[int]:
    """As `receive_blocks`. Raises: as that."""
    if isinstance(memory, HostBlocks):
        return receive_blocks(wire, memory.blocks, block_bytes, ids)
    sums = array("Q")
    step, staging = _buffer(memory, block_bytes, len(ids))
    for start in range(0, len(ids), step):
        part = ids[start : start + step]
        sums.extend(receive_blocks(wire, staging, block_bytes, array("Q", range(len(part)))))
        memory.copy_in(staging, part)
    return sums


def _buffer(memory: StagedBlocks, block_bytes: int, count: int) -> tuple[int, memoryview]:
    """How many blocks a part has, and room for one."""
    step = max(1, min(count, STAGING_BYTES // block_bytes))
    return step, memory.staging(step)
