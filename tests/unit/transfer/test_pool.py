"""A block pool in shared memory: what its owner writes, others read, and only while the generations say so."""

from __future__ import annotations

import mmap
import os
import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyphase.core.errors import ConfigurationError, KvError, TransferError
from polyphase.transfer import OpenedPool, SharedPool
from polyphase.wire.kv import KvLayout, PoolDescriptor

BLOCK_BYTES = 1000  # on purpose no power of two and no whole pages


def layout(block_bytes: int = BLOCK_BYTES) -> KvLayout:
    return KvLayout("float32", 1, 1, 1, 16, block_bytes, "test")


def fill(pool: SharedPool) -> None:
    for block_id in range(pool.block_count):
        content = bytes([block_id % 251]) * pool.block_bytes
        pool.blocks[block_id * pool.block_bytes : (block_id + 1) * pool.block_bytes] = content


def opened(pool: SharedPool) -> OpenedPool:
    return OpenedPool.from_fd(pool.fd, pool.descriptor("/nowhere", layout(pool.block_bytes)))


@given(block_ids=st.lists(st.integers(0, 39), max_size=60))
def test_blocks_arrive_in_the_order_of_the_offer(block_ids: list[int]) -> None:
    with SharedPool.create(40, BLOCK_BYTES) as pool, opened(pool) as reader:
        fill(pool)
        target = bytearray(len(block_ids) * BLOCK_BYTES)
        reader.read_blocks(block_ids, pool.generations(block_ids), memoryview(target))
        assert target == b"".join(bytes([block_id]) * BLOCK_BYTES for block_id in block_ids)


def test_long_runs_are_copied_in_pieces() -> None:
    with SharedPool.create(12, 1 << 20) as pool, opened(pool) as reader:
        fill(pool)
        target = bytearray(12 << 20)
        reader.read_blocks(range(12), pool.generations(range(12)), memoryview(target))
        assert target == pool.blocks


def test_a_new_pool_is_zero_page_aligned_and_sealed() -> None:
    with SharedPool.create(3, BLOCK_BYTES) as pool:
        assert not any(pool.blocks)
        assert len(pool.blocks) == 3 * BLOCK_BYTES
        assert pool.generations([0, 1, 2]) == [1, 1, 1]
        with pytest.raises(OSError):
            os.ftruncate(pool.fd, 10)
        with pytest.raises(OSError):
            mmap.mmap(pool.fd, 4096)  # writable
        with pytest.raises(OSError):
            os.pwrite(pool.fd, b"x", 0)


def test_a_renewed_block_cannot_be_read_under_an_old_offer() -> None:
    with SharedPool.create(4, BLOCK_BYTES) as pool, opened(pool) as reader:
        offered = pool.generations([0, 1, 2])
        pool.renew([1])
        target = memoryview(bytearray(3 * BLOCK_BYTES))
        with pytest.raises(TransferError, match=r"block 1 of pool .* somebody else"):
            reader.read_blocks([0, 1, 2], offered, target)
        reader.read_blocks([0, 1, 2], pool.generations([0, 1, 2]), target)


def test_a_block_renewed_during_the_copy_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with SharedPool.create(4, BLOCK_BYTES) as pool, opened(pool) as reader:
        copy = reader._copy

        def copy_while_the_owner_reuses_a_block(block_ids: list[int], target: memoryview) -> None:
            copy(block_ids, target)
            pool.renew([2])

        monkeypatch.setattr(reader, "_copy", copy_while_the_owner_reuses_a_block)
        with pytest.raises(TransferError, match="block 2"):
            reader.read_blocks([1, 2], pool.generations([1, 2]), memoryview(bytearray(2 * BLOCK_BYTES)))


def test_a_racing_owner_never_makes_a_reader_accept_mixed_content() -> None:
    """The owner keeps rewriting blocks, each time with one value all over; accepted copies are never a mixture."""
    with SharedPool.create(8, 64 * 1024) as pool, opened(pool) as reader:
        stop = threading.Event()

        def rewrite() -> None:
            dice = random.Random(7)
            while not stop.is_set():
                block_id = dice.randrange(8)
                pool.renew([block_id])
                start = block_id * pool.block_bytes
                content = bytes([dice.randrange(256)]) * 1024
                for part in range(0, pool.block_bytes, 1024):
                    pool.blocks[start + part : start + part + 1024] = content

        writer = threading.Thread(target=rewrite)
        writer.start()
        try:
            accepted = 0
            target = bytearray(8 * pool.block_bytes)
            for _ in range(300):
                try:
                    offered = pool.generations(range(8))
                    reader.read_blocks(range(8), offered, memoryview(target))
                except TransferError:
                    continue
                accepted += 1
        finally:
            stop.set()
            writer.join()
        # Blocks in the middle of a rewrite carry their new generation already, so only the last rewritten one may be mixed: an owner
        # offers no block that it still writes. All others are uniform.
        if accepted:
            blocks = [target[start : start + pool.block_bytes] for start in range(0, len(target), pool.block_bytes)]
            assert sum(len(set(block)) > 1 for block in blocks) <= 1


@pytest.mark.parametrize(
    ("block_ids", "generations", "byte_count", "message"),
    [
        ([4], [1], BLOCK_BYTES, "block 4 does not exist"),
        ([-1], [1], BLOCK_BYTES, "block -1 does not exist"),
        ([0, 1], [1], 2 * BLOCK_BYTES, "2 blocks were offered with 1 generations"),
        ([0, 1], [1, 1], BLOCK_BYTES, "2 blocks need 2000 writable bytes, not 1000"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(block_ids: list[int], generations: list[int], byte_count: int, message: str) -> None:
    with SharedPool.create(4, BLOCK_BYTES) as pool, opened(pool) as reader, pytest.raises(TransferError, match=message):
        reader.read_blocks(block_ids, generations, memoryview(bytearray(byte_count)))


def test_the_target_may_be_any_flat_buffer_but_not_read_only() -> None:
    with SharedPool.create(2, BLOCK_BYTES) as pool, opened(pool) as reader:
        fill(pool)
        target = bytearray(BLOCK_BYTES)
        reader.read_blocks([1], [1], memoryview(target).cast("f"))
        assert target == b"\x01" * BLOCK_BYTES
        with pytest.raises(TransferError):
            reader.read_blocks([1], [1], memoryview(bytes(BLOCK_BYTES)))


def test_a_reader_survives_the_owner_and_sees_the_last_content() -> None:
    pool = SharedPool.create(2, BLOCK_BYTES)
    fill(pool)
    with opened(pool) as reader:
        offered = pool.generations([1])
        pool.close()
        target = bytearray(BLOCK_BYTES)
        reader.read_blocks([1], offered, memoryview(target))
        assert target == b"\x01" * BLOCK_BYTES


def test_reading_from_a_closed_pool_is_a_transfer_error() -> None:
    with SharedPool.create(2, BLOCK_BYTES) as pool:
        reader = opened(pool)
        reader.close()
        reader.close()
        with pytest.raises(TransferError, match="was closed"):
            reader.read_blocks([1], [1], memoryview(bytearray(BLOCK_BYTES)))


def test_another_pool_than_described_is_refused() -> None:
    with SharedPool.create(2, BLOCK_BYTES) as pool, SharedPool.create(2, BLOCK_BYTES) as other:
        with pytest.raises(TransferError, match="another block pool than offered"):
            OpenedPool.from_fd(other.fd, pool.descriptor("/nowhere", layout()))
        wrong_size = PoolDescriptor(pool.pool_id, "/nowhere", 3, layout())
        with pytest.raises(TransferError, match="another block pool than offered"):
            OpenedPool.from_fd(pool.fd, wrong_size)


def test_foreign_memory_is_refused() -> None:
    fd = os.memfd_create("foreign")
    try:
        descriptor = PoolDescriptor("0" * 32, "/nowhere", 3, layout())
        with pytest.raises(TransferError, match="0 bytes of header"):
            OpenedPool.from_fd(fd, descriptor)
        os.ftruncate(fd, 8192)
        with pytest.raises(TransferError, match="is not a block pool"):
            OpenedPool.from_fd(fd, descriptor)
    finally:
        os.close(fd)


def test_memory_that_could_be_cut_short_is_refused() -> None:
    with SharedPool.create(2, BLOCK_BYTES) as pool:
        copy = os.memfd_create("copy", os.MFD_ALLOW_SEALING)
        try:
            os.write(copy, os.pread(pool.fd, 1 << 20, 0))
            with pytest.raises(TransferError, match="not sealed"):
                OpenedPool.from_fd(copy, pool.descriptor("/nowhere", layout()))
        finally:
            os.close(copy)


def test_a_pool_that_does_not_fit_says_how_much_was_wanted() -> None:
    with pytest.raises(ConfigurationError, match=r"wants 1,?\d.* bytes .* available"):
        SharedPool.create(1 << 30, 1 << 20)
    with pytest.raises(ConfigurationError, match="at least one block"):
        SharedPool.create(0, 10)


def test_a_layout_of_another_size_is_a_bug() -> None:
    with SharedPool.create(2, BLOCK_BYTES) as pool, pytest.raises(KvError):
        pool.descriptor("/nowhere", layout(BLOCK_BYTES + 1))


def test_progress_is_told_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    with SharedPool.create(2, BLOCK_BYTES, on_progress=lambda done, total: seen.append((done, total))):
        assert seen[-1][0] == seen[-1][1] >= 2 * BLOCK_BYTES


def test_closing_leaves_the_memory_to_those_who_still_hold_it() -> None:
    pool = SharedPool.create(2, BLOCK_BYTES)
    held = memoryview(pool.blocks)
    pool.close()
    pool.close()
    assert held[0] == 0
    held.release()


def test_without_memfd_a_temporary_file_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with SharedPool.create(2, BLOCK_BYTES) as pool, opened(pool) as reader:
        fill(pool)
        target = bytearray(BLOCK_BYTES)
        reader.read_blocks([1], [1], memoryview(target))
        assert target == b"\x01" * BLOCK_BYTES
