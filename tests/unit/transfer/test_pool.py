"""A block pool in shared memory: its sizes, its seals, and what others see of it."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator

import msgspec
import pytest

from polyphase.core.errors import ConfigurationError, TransferError
from polyphase.transfer import HostMemory, SharedPool
from polyphase.transfer import pool as pool_module
from polyphase.transfer.opened import OpenedPool
from polyphase.wire.transfer import RegionCard

BLOCK_BYTES = 1000  # on purpose no power of two and no whole pages


def card(pool: SharedPool) -> RegionCard:
    return RegionCard(pool.pool_id, "host", pool.block_count, pool.block_bytes, ["shm"])


@pytest.fixture
def pool() -> Iterator[SharedPool]:
    with SharedPool.create(4, BLOCK_BYTES) as made:
        yield made


def test_a_new_pool_is_zero_and_sealed(pool: SharedPool) -> None:
    assert not any(pool.blocks)
    assert len(pool.blocks) == 4 * BLOCK_BYTES
    assert pool.generations([0, 1, 2]) == [1, 1, 1]
    with pytest.raises(OSError):
        os.ftruncate(pool.fd, 10)
    with pytest.raises(OSError):
        mmap.mmap(pool.fd, 4096)  # writable
    with pytest.raises(OSError):
        os.pwrite(pool.fd, b"x", 0)


def test_what_the_owner_writes_others_see(pool: SharedPool) -> None:
    with OpenedPool.from_fd(pool.fd, card(pool)) as opened:
        pool.blocks[2 * BLOCK_BYTES] = 7
        pool.renew([2])
        assert opened.blocks[2 * BLOCK_BYTES] == 7
        assert list(opened.generation_words) == [1, 1, 2, 1]
        with pytest.raises(TypeError):
            opened.blocks[0] = 1


def test_a_reader_survives_the_owner() -> None:
    pool = SharedPool.create(2, BLOCK_BYTES)
    with OpenedPool.from_fd(pool.fd, card(pool)) as opened:
        pool.blocks[0] = 9
        pool.close()
        pool.close()
        assert opened.blocks[0] == 9
    opened.close()


def test_another_pool_than_described_is_refused(pool: SharedPool) -> None:
    with SharedPool.create(4, BLOCK_BYTES) as other, pytest.raises(TransferError, match="another block pool than offered"):
        OpenedPool.from_fd(other.fd, card(pool))
    with pytest.raises(TransferError, match="another block pool than offered"):
        OpenedPool.from_fd(pool.fd, msgspec.structs.replace(card(pool), block_count=5))


def test_memory_that_could_be_cut_short_is_refused(pool: SharedPool) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(os.pread(pool.fd, 4096, 0))
        file.flush()
        with pytest.raises(TransferError, match=r"4096 bytes long and not sealed"):
            OpenedPool.from_fd(file.fileno(), card(pool))
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    try:
        os.pwrite(fd, os.pread(pool.fd, 4096, 0), 0)
        os.ftruncate(fd, 1 << 20)
        with pytest.raises(TransferError, match="not sealed"):
            OpenedPool.from_fd(fd, card(pool))
    finally:
        os.close(fd)


@pytest.mark.parametrize(("content", "message"), [(b"", "0 bytes of header"), (b"x" * 4096, "not a block pool")])
def test_other_files_are_no_pools(content: bytes, message: str, pool: SharedPool) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        with pytest.raises(TransferError, match=message):
            OpenedPool.from_fd(file.fileno(), card(pool))


@pytest.mark.parametrize(("block_count", "block_bytes"), [(0, 4), (4, 0), (-1, 4)])
def test_sizes_must_be_positive(block_count: int, block_bytes: int) -> None:
    with pytest.raises(ConfigurationError, match="at least one block"):
        SharedPool.create(block_count, block_bytes)


def test_more_memory_than_there_is_is_refused_before_it_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "available_memory_bytes", lambda: 10_000)
    with pytest.raises(ConfigurationError, match=r"wants .* but 10,000 bytes .* are available; choose fewer KV bytes"):
        SharedPool.create(100, 4096)


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    with SharedPool.create(4, BLOCK_BYTES, lambda done, total: told.append((done, total))):
        assert told[-1][0] == told[-1][1] >= 4 * BLOCK_BYTES


class TestForeignMemory:
    def test_it_has_generations_of_its_own(self) -> None:
        memory = HostMemory(bytearray(30), 10)
        memory.renew([1, 1])
        assert memory.generations([0, 1, 2]) == [1, 3, 1]
        assert memory.block_count == 3

    def test_what_cannot_be_registered(self) -> None:
        with pytest.raises(ConfigurationError, match="writable and contiguous"):
            HostMemory(memoryview(b"abcd"), 2)
        with pytest.raises(ConfigurationError, match="writable and contiguous"):
            HostMemory(memoryview(bytearray(8))[::2], 2)
        with pytest.raises(ConfigurationError, match="no whole number of blocks"):
            HostMemory(bytearray(7), 2)
