"""The `cuda` backend on a real device: the conformance kit in one process, and CUDA IPC between two."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from polyphase.testing.transfer import BLOCK_BYTES, BLOCK_COUNT, ThreadWorld, TransferConformance
from polyphase.transfer import Agent, BlockMemory, Verdict
from polyphase.transfer.backends.cuda import CudaBackend
from polyphase.transfer.device import CudaMemory
from tests.unit.transfer.peers import OWNER, PeerProcess


class CudaWorld(ThreadWorld):
    def __init__(self) -> None:
        super().__init__(lambda: [CudaBackend()])

    def memory(self, block_count: int = BLOCK_COUNT, block_bytes: int = BLOCK_BYTES) -> BlockMemory:
        return CudaMemory(torch.zeros(block_count * block_bytes, dtype=torch.uint8, device="cuda"), block_bytes)

    def put(self, memory: BlockMemory, block_id: int, content: bytes) -> None:
        assert isinstance(memory, CudaMemory)
        memory.rows[block_id] = torch.frombuffer(bytearray(content), dtype=torch.uint8).cuda()
        torch.cuda.synchronize()

    def get(self, memory: BlockMemory, block_id: int) -> bytes:
        assert isinstance(memory, CudaMemory)
        return bytes(memory.rows[block_id].cpu().numpy())


class TestCuda(TransferConformance):
    @pytest.fixture
    def world(self) -> Iterator[CudaWorld]:
        with CudaWorld() as world:
            yield world

    def test_foreign_descriptors(self) -> None:  # type: ignore[override]
        """A tensor has no identity by which a second registration could be told."""


CUDA_OWNER = (
    OWNER.replace("backends = [ShmBackend(), TcpBackend()]", "backends = [CudaBackend()]")
    .replace(
        "import base64",
        "import base64, torch\n"
        "from polyphase.transfer.backends.cuda import CudaBackend\n"
        "from polyphase.transfer.device import CudaMemory\n"
        "import base64",
    )
    .replace(
        'pool = SharedPool.create(options["block_count"], options["block_bytes"])',
        'pool = CudaMemory(torch.zeros(options["block_count"] * options["block_bytes"], dtype=torch.uint8, device="cuda"), '
        'options["block_bytes"])',
    )
    .replace(
        "    pool.blocks[block_id * pool.block_bytes : (block_id + 1) * pool.block_bytes] = bytes([block_id % 251]) * pool.block_bytes",
        "    pool.rows[block_id] = block_id % 251",
    )
    .replace("region = agent.register(pool)", "torch.cuda.synchronize()\nregion = agent.register(pool)")
)


@pytest.mark.parametrize("block_bytes", [4096, 1 << 20])
def test_blocks_of_another_process(block_bytes: int) -> None:
    with PeerProcess(code=CUDA_OWNER, block_bytes=block_bytes) as owner, Agent("reader", backends=[CudaBackend()]) as agent:
        memory = CudaMemory(torch.zeros(64 * block_bytes, dtype=torch.uint8, device="cuda"), block_bytes)
        region = agent.register(memory)
        session = agent.connect(owner.card)
        ids = [9, 3, 60, 4]
        session.fetch(session.blocks(owner.region_id, ids, [1] * 4), region.blocks([5, 6, 7, 8])).require()
        assert [int(memory.rows[place].unique()) for place in (5, 6, 7, 8)] == ids
        outcome = session.fetch(session.blocks(owner.region_id, [1, 2], [1, 7]), region.blocks([1, 2]))
        assert list(outcome.verdicts) == [Verdict.DONE, Verdict.STALE]
        session.write(region.blocks([5, 6]), session.blocks(owner.region_id, [20, 21], [1, 1])).wait().require()
        session.fetch(session.blocks(owner.region_id, [20, 21], [1, 1]), region.blocks([30, 31])).require()
        assert [int(memory.rows[place].unique()) for place in (30, 31)] == [9, 3]
