"""Memory as numbered blocks: what can be registered, and lists of blocks that were checked once and are used many times."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from polyphase.core.errors import ConfigurationError, ForeignDescriptor
from polyphase.wire.transfer import RegionCard

if TYPE_CHECKING:
    from polyphase.transfer.region import Region
    from polyphase.transfer.session import Session

NO_WORDS = array("Q")


class BlockMemory(Protocol):
    """`block_count` blocks of `block_bytes` bytes that an agent can register. `kind` is "host" or "cuda"."""

    @property
    def kind(self) -> str: ...

    @property
    def block_count(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...

    def generations(self, block_ids: Sequence[int]) -> list[int]:
        """Present generation of each block."""

    def renew(self, block_ids: Sequence[int]) -> None:
        """Give the blocks new generations; to be called before the first byte of other content is written."""


@runtime_checkable
class HostBlocks(Protocol):
    """Block memory that the processor can address: `blocks` are its bytes, `generation_words` the generations, unsigned 64-bit."""

    blocks: memoryview
    generation_words: memoryview


@runtime_checkable
class StagedBlocks(Protocol):
    """Block memory that only a device can address: bytes pass through a buffer that it likes. Calls return when the bytes are there.

    Raises: TransferError if the device fails.
    """

    generation_words: memoryview

    def staging(self, block_count: int) -> memoryview:
        """Host memory for so many blocks."""

    def copy_out(self, block_ids: Sequence[int], into: memoryview) -> None: ...

    def copy_in(self, data: memoryview, block_ids: Sequence[int]) -> None: ...


class HostMemory:
    """Somebody else's buffer (numpy, bytearray, a tensor on the CPU) as blocks. Its generations are known to this process only.

    Owner: the buffer stays the caller's, who keeps it alive and in place for as long as it is registered.
    """

    kind = "host"

    def __init__(self, buffer: memoryview | bytearray, block_bytes: int) -> None:
        """Raises: ConfigurationError if the buffer is read-only, not contiguous, or no whole number of blocks."""
        view = memoryview(buffer)
        if view.readonly or not view.c_contiguous:
            raise ConfigurationError("memory to register must be writable and contiguous")
        if block_bytes < 1 or view.nbytes == 0 or view.nbytes % block_bytes:
            raise ConfigurationError(f"{view.nbytes} bytes are no whole number of blocks of {block_bytes} bytes")
        self.blocks = view.cast("B")
        self.block_bytes = block_bytes
        self.block_count = view.nbytes // block_bytes
        self.generation_words = memoryview(bytearray(8 * self.block_count)).cast("Q")
        for block_id in range(self.block_count):
            self.generation_words[block_id] = 1

    def generations(self, block_ids: Sequence[int]) -> list[int]:
        words = self.generation_words
        return [words[block_id] for block_id in block_ids]

    def renew(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            self.generation_words[block_id] += 1


class LocalBlocks:
    """Blocks of a registered region of this agent."""

    __slots__ = ("ids", "region")

    def __init__(self, region: Region, ids: array[int]) -> None:
        self.region = region
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> LocalBlocks:
        return LocalBlocks(self.region, self.ids[part])


class RemoteBlocks:
    """Blocks of a peer's region, each with the generation under which it was offered."""

    __slots__ = ("generations", "ids", "region", "session")

    def __init__(self, session: Session, region: RegionCard, ids: array[int], generations: array[int]) -> None:
        self.session = session
        self.region = region
        self.ids = ids
        self.generations = generations

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> RemoteBlocks:
        return RemoteBlocks(self.session, self.region, self.ids[part], self.generations[part])


def words_of(numbers: Iterable[int], what: str) -> array[int]:
    """Raises: ForeignDescriptor if one of them is no unsigned 64-bit number."""
    if isinstance(numbers, array) and numbers.typecode == "Q":
        return numbers
    try:
        return array("Q", numbers)
    except (OverflowError, TypeError) as error:
        raise ForeignDescriptor(f"{what} must be whole numbers from 0: {error}") from error


def checked_ids(block_ids: Iterable[int], block_count: int, what: str) -> array[int]:
    """Raises: ForeignDescriptor if a block does not exist. Cost: about 10 ns a block."""
    ids = words_of(block_ids, f"block ids of {what}")
    if ids and max(ids) >= block_count:
        bad = next(block_id for block_id in ids if block_id >= block_count)
        raise ForeignDescriptor(f"block {bad} does not exist: {what} has blocks 0 to {block_count - 1}")
    return ids


def pack_words(words: array[int]) -> bytes:
    """Little-endian, as they travel."""
    if sys.byteorder == "big":
        words = words[:]
        words.byteswap()
    return words.tobytes()


def unpack_words(data: bytes, what: str) -> array[int]:
    """Raises: ForeignDescriptor if `data` holds no whole words."""
    if len(data) % 8:
        raise ForeignDescriptor(f"{what} came as {len(data)} bytes, which are no 64-bit words")
    words = array("Q")
    words.frombytes(data)
    if sys.byteorder == "big":
        words.byteswap()
    return words
