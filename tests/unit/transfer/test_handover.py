"""The descriptor of a pool travels to another process, or the reader is told why not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from polyphase.core.clock import ManualClock
from polyphase.core.errors import ConfigurationError, TransferError
from polyphase.transfer import OpenedPools, PoolServer, SharedPool, open_pool
from polyphase.wire.kv import KvLayout, PoolDescriptor

BLOCK_BYTES = 4096
LAYOUT = KvLayout("float32", 1, 1, 1, 16, BLOCK_BYTES, "test")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: those of sockets are limited to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="pp-", dir="/tmp") as path:
        yield Path(path)


async def test_a_pool_is_opened_through_its_socket(folder: Path) -> None:
    with SharedPool.create(4, BLOCK_BYTES) as pool:
        pool.blocks[BLOCK_BYTES] = 7
        server = PoolServer()
        await server.start(str(folder / "pool"), pool.fd)
        assert (folder / "pool").stat().st_mode & 0o777 == 0o600
        for _ in range(3):
            with await open_pool(pool.descriptor(str(folder / "pool"), LAYOUT), timeout_s=20) as reader:
                target = bytearray(BLOCK_BYTES)
                reader.read_blocks([1], [1], memoryview(target))
                assert target[0] == 7
        await server.close()
        await server.close()
        assert os.listdir(folder) == []


async def test_a_socket_of_a_dead_owner_is_replaced(folder: Path) -> None:
    (folder / "pool").write_text("left behind")
    with SharedPool.create(1, BLOCK_BYTES) as pool:
        server = PoolServer()
        await server.start(str(folder / "pool"), pool.fd)
        (await open_pool(pool.descriptor(str(folder / "pool"), LAYOUT), timeout_s=20)).close()
        await server.close()


async def test_a_path_too_long_or_impossible_is_a_configuration_error(folder: Path) -> None:
    with SharedPool.create(1, BLOCK_BYTES) as pool:
        with pytest.raises(ConfigurationError, match="more than 107 bytes"):
            await PoolServer().start(str(folder / ("x" * 100)), pool.fd)
        with pytest.raises(ConfigurationError, match="cannot be served"):
            await PoolServer().start(str(folder / "missing" / "pool"), pool.fd)


async def test_absent_silent_and_foreign_owners_are_transfer_errors(folder: Path) -> None:
    descriptor = PoolDescriptor("0" * 32, str(folder / "s"), 1, LAYOUT)
    with pytest.raises(TransferError, match="cannot be reached"):
        await open_pool(descriptor, timeout_s=20)

    async def stay_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def chatter(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400")
        await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(stay_silent, folder / "s"):
        with pytest.raises(TransferError, match="did not hand it over"):
            await open_pool(descriptor, timeout_s=0.05)
    (folder / "s").unlink(missing_ok=True)
    async with await asyncio.start_unix_server(chatter, folder / "s"):
        with pytest.raises(TransferError, match="does not hand over a block pool"):
            await open_pool(descriptor, timeout_s=20)


async def test_opened_pools_are_shared_and_forgotten(folder: Path) -> None:
    with SharedPool.create(1, BLOCK_BYTES) as pool:
        descriptor = pool.descriptor(str(folder / "pool"), LAYOUT)
        pools = OpenedPools()
        with pytest.raises(TransferError):
            await pools.get(descriptor)
        server = PoolServer()
        await server.start(str(folder / "pool"), pool.fd)
        first, second = await asyncio.gather(pools.get(descriptor), pools.get(descriptor))
        assert first is second is await pools.get(descriptor)
        with pytest.raises(TransferError, match="the offer says"):
            await pools.get(msgspec.structs.replace(descriptor, block_count=2))
        pools.forget(pool.pool_id)
        pools.forget(pool.pool_id)
        with pytest.raises(TransferError, match="was closed"):
            first.read_blocks([0], [1], memoryview(bytearray(BLOCK_BYTES)))
        assert await pools.get(descriptor) is not first
        pools.close()
        with pytest.raises(TransferError, match="closing"):
            await pools.get(descriptor)
        await server.close()


async def test_pools_of_earlier_lives_and_unused_ones_are_unmapped(folder: Path) -> None:
    clock = ManualClock()
    pools = OpenedPools(clock=clock)
    readers = []
    for _ in range(2):  # two lives of one worker
        with SharedPool.create(1, BLOCK_BYTES) as pool:
            server = PoolServer()
            await server.start(str(folder / "pool"), pool.fd)
            readers.append(await pools.get(pool.descriptor(str(folder / "pool"), LAYOUT)))
            await server.close()
    target = memoryview(bytearray(BLOCK_BYTES))
    with pytest.raises(TransferError, match="was closed"):
        readers[0].read_blocks([0], [1], target)
    clock.advance(59 * 10**9)
    pools.close_idle()
    readers[1].read_blocks([0], [1], target)
    clock.advance(2 * 10**9)
    pools.close_idle()
    with pytest.raises(TransferError, match="was closed"):
        readers[1].read_blocks([0], [1], target)
    pools.close()


async def test_a_cancelled_caller_does_not_spoil_the_attempt_of_others(folder: Path) -> None:
    with SharedPool.create(1, BLOCK_BYTES) as pool:
        server = PoolServer()
        await server.start(str(folder / "pool"), pool.fd)
        pools = OpenedPools()
        descriptor = pool.descriptor(str(folder / "pool"), LAYOUT)
        hasty = asyncio.create_task(pools.get(descriptor))
        patient = asyncio.create_task(pools.get(descriptor))
        await asyncio.sleep(0)
        hasty.cancel()
        assert (await patient).pool_id == pool.pool_id
        pools.close()
        await server.close()


OWNER = """
import asyncio, sys, msgspec
from polyphase.transfer import PoolServer, SharedPool
from polyphase.wire.kv import KvLayout

async def main():
    pool = SharedPool.create(4, 4096)
    pool.blocks[:] = bytes(range(4)) * 4096
    await PoolServer().start(sys.argv[1], pool.fd)
    descriptor = pool.descriptor(sys.argv[1], KvLayout("float32", 1, 1, 1, 16, 4096, "test"))
    print(msgspec.json.encode(descriptor).decode(), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_blocks_of_a_killed_process_stay_readable_and_nothing_is_left(folder: Path) -> None:
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", OWNER, str(folder / "pool"), stdout=asyncio.subprocess.PIPE)
    try:
        assert owner.stdout is not None
        line = await owner.stdout.readline()
        descriptor = msgspec.json.decode(line, type=PoolDescriptor)
        with await open_pool(descriptor, timeout_s=10) as reader:
            owner.kill()
            await owner.wait()
            target = bytearray(2 * BLOCK_BYTES)
            reader.read_blocks([3, 1], [1, 1], memoryview(target))
            assert target == bytes(range(4)) * 2048
    finally:
        with contextlib.suppress(ProcessLookupError):
            owner.kill()
        await owner.wait()
    assert not [name for name in os.listdir("/dev/shm") if "polyphase" in name]
    with pytest.raises(TransferError, match="cannot be reached"):
        await open_pool(descriptor, timeout_s=20)
