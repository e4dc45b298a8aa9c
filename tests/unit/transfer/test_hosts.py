"""Two hosts: network namespaces joined by a pair of virtual interfaces where the system allows it, two loopback addresses elsewhere."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from polyphase.transfer import Agent, HostMemory
from polyphase.transfer.backends.tcp import TcpBackend
from tests.unit.transfer.peers import PeerProcess

NUMBERS = itertools.count()
TOKEN = "a token of sixteen bytes or more"


@dataclass(frozen=True)
class Hosts:
    """How to run something on the other host, and where both can be reached."""

    prefix: tuple[str, ...]
    theirs: str
    ours: str
    kind: str


def _run(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    name = f"pp{os.getpid() % 10000}{next(NUMBERS)}"  # of its own: an interface may outlive its namespace for a moment
    ip = shutil.which("ip")
    if os.getuid() != 0 or ip is None or not _run(ip, "netns", "add", name):
        yield Hosts((), "127.0.0.2", "127.0.0.1", "addresses")
        return
    try:
        here, there = f"{name}a", f"{name}b"
        number = os.getpid() % 250
        made = (
            _run(ip, "link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
            and _run(ip, "addr", "add", f"10.231.{number}.1/30", "dev", here)
            and _run(ip, "link", "set", here, "up")
            and _run(ip, "-n", name, "addr", "add", f"10.231.{number}.2/30", "dev", there)
            and _run(ip, "-n", name, "link", "set", there, "up")
        )
        if made:
            yield Hosts((ip, "netns", "exec", name), f"10.231.{number}.2", f"10.231.{number}.1", "namespaces")
        else:
            yield Hosts((), "127.0.0.2", "127.0.0.1", "addresses")
    finally:
        _run(ip, "netns", "delete", name)  # the interfaces go with it


def test_blocks_move_between_two_hosts(hosts: Hosts) -> None:
    count, width = 300, 10_000
    with (
        PeerProcess(
            block_count=count, block_bytes=width, tcp_address=f"{hosts.theirs}:0", host="there", token=TOKEN, prefix=hosts.prefix
        ) as owner,
        Agent("reader", backends=[TcpBackend()], host="here", tcp_address=f"{hosts.ours}:0", token=TOKEN.encode()) as agent,
    ):
        assert owner.card.tcp_address.startswith(hosts.theirs)
        memory = HostMemory(bytearray(count * width), width)
        region = agent.register(memory)
        with agent.connect(owner.card) as session:
            assert session.why().splitlines()[0] == f"tcp: chosen: agent owner listens at {owner.card.tcp_address}"
            assert "shm: not possible: this agent was made without it" in session.why()
            lease_id = owner.ask("offer", "[1,2,3]")["lease_id"]
            session.take_lease(lease_id)
            remote = session.blocks(owner.region_id, range(count), [1] * count)
            order = [(7 * block_id) % count for block_id in range(count)]
            session.read(remote, region.blocks(order)).wait().require()
            for block_id in range(count):
                assert memory.blocks[order[block_id] * width : (order[block_id] + 1) * width] == bytes([block_id % 251]) * width
            assert owner.ask("pinned") == {"pinned": [1, 2, 3]}
            session.give_back(lease_id)
            assert owner.hear() == {"ended": "released"}
            # And back again, the blocks that were read, to other places.
            session.write(region.blocks(order[:100]), remote[100:200]).wait().require()
            session.read(remote[100:200], region.blocks(range(100))).wait().require()
            assert memory.blocks[: 100 * width] == b"".join(bytes([block_id]) * width for block_id in range(100))


def test_a_link_that_goes_down_ends_a_transfer_by_its_deadline(hosts: Hosts) -> None:
    """Where there are no namespaces, the other process is stopped: that looks the same from here."""
    with (
        PeerProcess(block_count=64, block_bytes=1 << 20, tcp_address=f"{hosts.theirs}:0", host="there", prefix=hosts.prefix) as owner,
        Agent("reader", backends=[TcpBackend()], host="here", tcp_address=f"{hosts.ours}:0") as agent,
    ):
        region = agent.register(HostMemory(bytearray(64 << 20), 1 << 20))
        session = agent.connect(owner.card)
        remote, local = session.blocks(owner.region_id, range(64), [1] * 64), region.blocks(range(64))
        session.fetch(remote, local).require()

        def cut_off() -> None:
            if hosts.kind == "namespaces":
                _run("ip", "link", "set", f"{hosts.prefix[3]}a", "down")
            else:
                owner.process.send_signal(signal.SIGSTOP)

        cut = threading.Timer(0.01, cut_off)
        cut.start()
        outcomes = [session.read(remote, local, 0.5).wait() for _ in range(3)]
        cut.join()
        assert not outcomes[-1].is_done
