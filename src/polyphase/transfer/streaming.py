"""Scattered blocks through a stream socket, from and into registered memory, a megabyte a system call, checksums on the way.

In C++, without the interpreter lock, a block is copied through a buffer that stays in the cache and summed in the same pass, at either end.
In Python, where there is no compiler, it goes straight from and into its memory and is summed after; if it changes between the two, its sum
does not fit, and the reader throws it away.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator

from xxhash import xxh3_64_intdigest

from polyphase.core import native
from polyphase.core.clock import MonotonicClock
from polyphase.core.errors import PeerLost, TransferError, TransferTimeout
from polyphase.transfer.wire import Wire

CHUNK_BYTES = 1 << 20


def send_blocks(wire: Wire, memory: memoryview, block_bytes: int, ids: array[int]) -> array[int]:
    """Send the blocks in order; returns the checksum of each. Raises: as `Wire.send`; TransferError if the memory was released."""
    return _stream(wire, memory, block_bytes, ids, wire.send_buffers, sends=True)


def receive_blocks(wire: Wire, memory: memoryview, block_bytes: int, ids: array[int]) -> array[int]:
    """Receive blocks into their places; returns the checksum of each as it arrived. Raises: as `Wire.receive`; TransferError."""
    return _stream(wire, memory, block_bytes, ids, wire.receive_buffers, sends=False)


def _stream(
    wire: Wire, memory: memoryview, block_bytes: int, ids: array[int], move: Callable[[list[memoryview]], None], *, sends: bool
) -> array[int]:
    try:
        if native.extension is not None and isinstance(wire.clock, MonotonicClock):
            return _stream_natively(wire, memory, block_bytes, ids, sends=sends)
        return stream_in_python(memory, block_bytes, ids, move)
    except ValueError as error:
        wire.close()
        raise TransferError(f"the memory was released while its blocks were on their way: {error}") from error


def _stream_natively(wire: Wire, memory: memoryview, block_bytes: int, ids: array[int], *, sends: bool) -> array[int]:
    assert native.extension is not None
    with wire.failing_well():
        told = native.extension.stream_blocks(memory, ids, block_bytes, wire.socket.fileno(), wire.deadline_ns, sends)
        if told == "late":
            raise TransferTimeout(f"{wire.peer} did not answer in time")
        if told == "closed":
            raise PeerLost(f"{wire.peer} closed the connection")
    sums = array("Q")
    sums.frombytes(told)
    return sums


def stream_in_python(memory: memoryview, block_bytes: int, ids: array[int], move: Callable[[list[memoryview]], None]) -> array[int]:
    """The same, a chunk at a time. Raises: ValueError if the memory was released."""
    sums = array("Q")
    for chunk in _chunks(ids, max(1, CHUNK_BYTES // block_bytes)):
        blocks = [memory[block_id * block_bytes : (block_id + 1) * block_bytes] for block_id in chunk]
        move(_joined(memory, block_bytes, chunk, blocks))
        sums.extend([xxh3_64_intdigest(block) for block in blocks])
    return sums


def _chunks(ids: array[int], step: int) -> Iterator[array[int]]:
    for start in range(0, len(ids), step):
        yield ids[start : start + step]


def _joined(memory: memoryview, width: int, chunk: array[int], blocks: list[memoryview]) -> list[memoryview]:
    """The same bytes as `blocks`, neighbours in memory as one buffer."""
    buffers: list[memoryview] = []
    start = 0
    for end in range(1, len(chunk) + 1):
        if end == len(chunk) or chunk[end] != chunk[end - 1] + 1:
            buffers.append(blocks[start] if end - start == 1 else memory[chunk[start] * width : (chunk[end - 1] + 1) * width])
            start = end
    return buffers
