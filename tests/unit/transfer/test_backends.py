"""Each backend passes the conformance kit; and what only it promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from polyphase.testing.transfer import BLOCK_BYTES, BLOCK_COUNT, ThreadWorld, TransferConformance, transfer_threads
from polyphase.transfer import Agent, BlockMemory, HostMemory, SharedPool
from polyphase.transfer.backends.memory import MemoryNetwork
from polyphase.transfer.backends.shm import ShmBackend
from polyphase.transfer.backends.tcp import TcpBackend

TOKEN = b"a secret that both know"


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield
    assert transfer_threads() == []


class TestShm(TransferConformance):
    @pytest.fixture
    def world(self) -> Iterator[ThreadWorld]:
        with ThreadWorld(lambda: [ShmBackend()]) as world:
            yield world


class TestShmInTwoLanes(TransferConformance):
    @pytest.fixture
    def world(self) -> Iterator[ThreadWorld]:
        with ThreadWorld(lambda: [ShmBackend(lane_count=2), TcpBackend()]) as world:
            yield world


class TestTcp(TransferConformance):
    """Two hosts, as far as the agents can tell."""

    @pytest.fixture
    def world(self) -> Iterator[ThreadWorld]:
        with ThreadWorld(lambda: [TcpBackend()], host=lambda name: name, tcp_address="127.0.0.1:0", token=TOKEN) as world:
            yield world


class TestStreamsOnOneHost(TransferConformance):
    """Memory that cannot be shared, over the Unix socket."""

    @pytest.fixture
    def world(self) -> Iterator[ThreadWorld]:
        def foreign(block_count: int, block_bytes: int) -> HostMemory:
            return HostMemory(bytearray(block_count * block_bytes), block_bytes)

        with ThreadWorld(lambda: [ShmBackend(), TcpBackend()], foreign) as world:
            yield world

    def test_foreign_descriptors(self) -> None:  # type: ignore[override]
        """A buffer has no identity by which a second registration could be told; see `TestShm`."""


class MemoryWorld:
    """One process, virtual time."""

    def __init__(self) -> None:
        self.network = MemoryNetwork(seed=1)
        self._agents: list[Agent] = []
        self._pools: list[SharedPool] = []

    def agent(self, name: str) -> Agent:
        self._agents.append(Agent(name, backends=[self.network.backend()], runtime=self.network.runtime()))
        return self._agents[-1]

    def memory(self, block_count: int = BLOCK_COUNT, block_bytes: int = BLOCK_BYTES) -> BlockMemory:
        self._pools.append(SharedPool.create(block_count, block_bytes))
        return self._pools[-1]

    put = ThreadWorld.put
    get = ThreadWorld.get

    def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(2000):
            if condition():
                return
            self.network.run(50_000_000)
        raise AssertionError("waited 100 virtual seconds in vain")

    def close(self) -> None:
        for agent in self._agents:
            agent.close()
        self.network.close()
        for pool in self._pools:
            pool.close()


class TestMemory(TransferConformance):
    @pytest.fixture
    def world(self) -> Iterator[MemoryWorld]:
        world = MemoryWorld()
        yield world
        world.close()
