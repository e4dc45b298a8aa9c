"""The `cuda` backend and the way round it through the host, with memory that poses as a device's: conformance, processes, refusals."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from polyphase.testing.transfer import BLOCK_BYTES, BLOCK_COUNT, ThreadWorld, TransferConformance
from polyphase.transfer import Agent, BlockMemory, SharedPool, Verdict, staging
from polyphase.transfer.backends.shm import ShmBackend
from polyphase.transfer.backends.tcp import TcpBackend
from polyphase.transfer.device import CudaMemory
from tests.unit.transfer.peers import OWNER, PeerProcess
from tests.unit.transfer.posing import PosingIpc, posing_backend, posing_memory


class PosingWorld(ThreadWorld):
    def memory(self, block_count: int = BLOCK_COUNT, block_bytes: int = BLOCK_BYTES) -> BlockMemory:
        return posing_memory(block_count, block_bytes, offset_blocks=3)

    def put(self, memory: BlockMemory, block_id: int, content: bytes) -> None:
        assert isinstance(memory, CudaMemory)
        memory.rows[block_id] = torch.frombuffer(bytearray(content), dtype=torch.uint8)

    def get(self, memory: BlockMemory, block_id: int) -> bytes:
        assert isinstance(memory, CudaMemory)
        return bytes(memory.rows[block_id].numpy())


class DeviceConformance(TransferConformance):
    def test_foreign_descriptors(self) -> None:  # type: ignore[override]
        """A tensor has no identity by which a second registration could be told."""


class TestPosing(DeviceConformance):
    @pytest.fixture
    def world(self) -> Iterator[PosingWorld]:
        with PosingWorld(lambda: [posing_backend()]) as world:
            yield world


class TestStaged(DeviceConformance):
    """`tcp`, with a buffer that holds a few blocks only."""

    @pytest.fixture
    def world(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[PosingWorld]:
        monkeypatch.setattr(staging, "STAGING_BYTES", 3 * BLOCK_BYTES)
        with PosingWorld(lambda: [TcpBackend()]) as world:
            yield world


POSING_OWNER = (
    OWNER.replace("backends = [ShmBackend(), TcpBackend()]", "backends = [posing_backend(), ShmBackend(), TcpBackend()]")
    .replace("import base64", "from tests.unit.transfer.posing import posing_backend, posing_memory\nimport base64")
    .replace("SharedPool.create(", "posing_memory(offset_blocks=5, *(")
    .replace('options["block_bytes"])\nfor', 'options["block_bytes"]))\nfor')
    .replace(
        "    pool.blocks[block_id * pool.block_bytes : (block_id + 1) * pool.block_bytes] = bytes([block_id % 251]) * pool.block_bytes",
        "    pool.rows[block_id] = block_id % 251",
    )
)


def _first_bytes(memory: CudaMemory, places: list[int]) -> list[int]:
    return [int(memory.rows[place].unique()) for place in places]


def test_blocks_of_another_process_at_an_offset() -> None:
    ipc = PosingIpc()
    with PeerProcess(code=POSING_OWNER) as owner, Agent("reader", backends=[posing_backend(ipc), TcpBackend()]) as agent:
        memory = posing_memory(64, 4096)
        region = agent.register(memory)
        with agent.connect(owner.card) as session:
            assert session.backend == "cuda"
            source = session.blocks(owner.region_id, [9, 3, 60, 4], [1] * 4)
            session.fetch(source, region.blocks([5, 6, 7, 8])).require()
            assert _first_bytes(memory, [5, 6, 7, 8]) == [9, 3, 60, 4]
            outcome = session.fetch(session.blocks(owner.region_id, [1, 2], [1, 7]), region.blocks([1, 2]))
            assert list(outcome.verdicts) == [Verdict.DONE, Verdict.STALE]
            session.write(region.blocks([5, 6]), session.blocks(owner.region_id, [20, 21], [1, 1])).wait().require()
            session.fetch(session.blocks(owner.region_id, [20, 21], [1, 1]), region.blocks([30, 31])).require()
            assert _first_bytes(memory, [30, 31]) == [9, 3]
            assert (ipc.shared_count, ipc.withdrawn_count) == (2, 1)  # tried once at registration, and opened once by the owner

            # What is copied from the memory of a process that died is not believed, though it can still be read.
            owner.process.kill()
            owner.process.wait()
            outcome = session.fetch(source, region.blocks([5, 6, 7, 8]), timeout_s=5)
            assert Verdict.DONE not in outcome.verdicts


def test_memory_that_cannot_be_shared_goes_through_the_host() -> None:
    backend = posing_backend(PosingIpc(refuses="no handles for expandable segments"))
    with (
        PeerProcess(code=POSING_OWNER) as owner,
        Agent("reader", backends=[backend, ShmBackend(), TcpBackend()]) as agent,
    ):
        memory = posing_memory(64, 4096)
        region = agent.register(memory)
        assert region.card.backends == ["tcp"]
        with agent.connect(owner.card) as session:
            # What I read is opened at the other's; what is mine is pulled by nobody, and so streamed.
            session.fetch(session.blocks(owner.region_id, [9, 3], [1] * 2), region.blocks([5, 6])).require()
            session.write(region.blocks([5, 6]), session.blocks(owner.region_id, [20, 21], [1, 1])).wait().require()
            session.fetch(session.blocks(owner.region_id, [20, 21], [1, 1]), region.blocks([30, 31])).require()
            assert _first_bytes(memory, [5, 6, 30, 31]) == [9, 3, 9, 3]


def test_after_a_failure_to_open_the_next_backend_is_taken() -> None:
    backend = posing_backend(PosingIpc(fails="invalid device context"))
    with PeerProcess(code=POSING_OWNER) as owner, Agent("reader", backends=[backend, TcpBackend()]) as agent:
        memory = posing_memory(64, 4096)
        region = agent.register(memory)
        with agent.connect(owner.card) as session:
            source = session.blocks(owner.region_id, [9, 3], [1] * 2)
            first = session.fetch(source, region.blocks([5, 6]))
            assert set(first.verdicts) == {Verdict.REFUSED}
            assert "cuda: not possible: invalid device context" in session.why()
            assert session.backend == "tcp"
            session.fetch(source, region.blocks([5, 6])).require()
            assert _first_bytes(memory, [5, 6]) == [9, 3]


def test_a_device_reads_from_the_host_and_the_host_from_a_device() -> None:
    with (
        SharedPool.create(8, 4096) as pool,
        Agent("host", backends=[ShmBackend(), TcpBackend()]) as host,
        Agent("device", backends=[posing_backend(), ShmBackend(), TcpBackend()]) as device,
    ):
        pool.blocks[:4096] = b"\x07" * 4096
        memory = posing_memory(8, 4096)
        lent, held = host.register(pool), device.register(memory)
        with device.connect(host.card) as session:
            session.fetch(session.blocks(lent.region_id, [0], [1]), held.blocks([5])).require()
        assert _first_bytes(memory, [5]) == [7]
        with host.connect(device.card) as session:
            session.fetch(session.blocks(held.region_id, [5], [1]), lent.blocks([2])).require()
        assert bytes(pool.blocks[2 * 4096 : 3 * 4096]) == b"\x07" * 4096
