"""The `nixl` backend with the real library, on the CPU over UCX: `make test-nixl`. Not part of `make test`: it downloads 90 MB."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from polyphase.testing.transfer import ThreadWorld, TransferConformance, transfer_threads
from polyphase.transfer import Agent, SharedPool
from polyphase.transfer.backends.nixl import NixlBackend
from polyphase.transfer.backends.shm import ShmBackend
from polyphase.transfer.backends.tcp import TcpBackend


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield
    assert transfer_threads() == []


class TestNixl(TransferConformance):
    @pytest.fixture
    def world(self) -> Iterator[ThreadWorld]:
        with ThreadWorld(lambda: [NixlBackend()], host=lambda name: name, tcp_address="127.0.0.1:0") as world:
            yield world


def test_it_is_preferred_to_tcp_between_hosts_and_shm_to_it_on_one() -> None:
    def agent(name: str, host: str) -> Agent:
        return Agent(name, backends=[ShmBackend(), NixlBackend(), TcpBackend()], host=host, tcp_address="127.0.0.1:0")

    with agent("a", "x") as a, agent("b", "x") as b, agent("c", "y") as c:
        with b.connect(a.card) as session:
            assert session.backend == "shm"
        with c.connect(a.card) as session:
            assert session.choice.possible == ["nixl", "tcp"]


def test_a_process_with_an_agent_exits_cleanly() -> None:
    script = """
from polyphase.transfer import Agent, SharedPool
from polyphase.transfer.backends.nixl import NixlBackend
a, b = Agent("a", backends=[NixlBackend()]), Agent("b", backends=[NixlBackend()])
pool, other = SharedPool.create(4, 4096), SharedPool.create(4, 4096)
region, target = a.register(pool), b.register(other)
session = b.connect(a.card)
session.fetch(session.blocks(region.region_id, [1], [1]), target.blocks([2])).require()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_blocks_of_a_killed_owner_fail() -> None:
    from tests.unit.transfer.peers import OWNER, PeerProcess

    code = OWNER.replace("backends = [ShmBackend(), TcpBackend()]", "backends = [NixlBackend()]").replace(
        "import base64", "from polyphase.transfer.backends.nixl import NixlBackend\nimport base64"
    )
    with (
        PeerProcess(code=code) as owner,
        Agent("reader", backends=[NixlBackend()]) as agent,
        SharedPool.create(4, 4096) as pool,
    ):
        region = agent.register(pool)
        session = agent.connect(owner.card)
        remote = session.blocks(owner.region_id, [3, 9], [1, 1])
        session.fetch(remote, region.blocks([0, 1])).require()
        assert pool.blocks[4096] == 9
        owner.process.kill()
        owner.process.wait()
        assert not session.fetch(remote, region.blocks([2, 3]), 5).is_done
