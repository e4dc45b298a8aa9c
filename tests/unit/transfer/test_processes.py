"""Real processes: killed in the middle, stopped, frozen out, gone without a word; and a clean exit of our own."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from polyphase.core.errors import PeerLost, StaleDescriptor, TransferRefused, WireError
from polyphase.testing.transfer import transfer_threads
from polyphase.transfer import Agent, HostMemory, SharedPool, Verdict
from polyphase.transfer.backends.tcp import TcpBackend
from tests.unit.transfer.peers import PeerProcess

TOKEN = "a token of sixteen bytes or more"


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield
    assert transfer_threads() == []


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s, "waited 20 s in vain"
        time.sleep(0.005)


def content(block_id: int, width: int) -> bytes:
    return bytes([block_id % 251]) * width


def tcp_agent(name: str = "reader") -> Agent:
    return Agent(name, backends=[TcpBackend()], host="another host", tcp_address="127.0.0.1:0", token=TOKEN.encode())


def tcp_owner(**options: int) -> PeerProcess:
    return PeerProcess(backends="tcp", tcp_address="127.0.0.1:0", host="the owner's host", token=TOKEN, **options)  # type: ignore[arg-type]


def test_mapped_blocks_of_a_killed_process_stay_good() -> None:
    with PeerProcess() as owner, Agent("reader") as agent, SharedPool.create(4, 4096) as pool:
        region = agent.register(pool)
        session = agent.connect(owner.card)
        remote = session.blocks(owner.region_id, [9, 3], [1, 1])
        session.fetch(remote, region.blocks([0, 1])).require()
        owner.process.send_signal(signal.SIGKILL)
        owner.process.wait()
        until(lambda: session.is_lost)
        session.fetch(remote, region.blocks([2, 3])).require()
        assert pool.blocks[2 * 4096 :] == content(9, 4096) + content(3, 4096)
        with pytest.raises(PeerLost):
            agent.connect(owner.card)
        session.give_back("whatever")  # a dead peer is no error
    assert not [name for name in os.listdir("/dev/shm") if "polyphase" in name]


@pytest.mark.parametrize("direction", ["read", "write"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_peer_that_dies_or_stops_during_a_transfer_over_tcp(how: signal.Signals, direction: str) -> None:
    """What had arrived is good, the rest is not used, and it ends: at once, or by its deadline."""
    width, count = 1 << 20, 128
    with tcp_owner(block_count=count, block_bytes=width) as owner, tcp_agent() as agent, SharedPool.create(count, width) as pool:
        region = agent.register(pool)
        session = agent.connect(owner.card)
        remote, local = session.blocks(owner.region_id, range(count), [1] * count), region.blocks(range(count))
        transfer = session.read(remote, local, 1.0) if direction == "read" else session.write(local, remote, 1.0)
        if direction == "read":
            until(lambda: pool.blocks[4 * width - 1] == 3 or transfer.poll())
        owner.process.send_signal(how)
        began_s = time.monotonic()
        outcome = transfer.wait()
        assert time.monotonic() - began_s < 15
        assert set(outcome.verdicts) <= {Verdict.DONE, Verdict.LOST, Verdict.LATE}
        assert Verdict.PENDING not in outcome.verdicts
        if direction == "read":
            for block_id, verdict in enumerate(outcome.verdicts):
                if verdict == Verdict.DONE:
                    assert pool.blocks[block_id * width : (block_id + 1) * width] == content(block_id, width)
        before = bytes(pool.blocks)
        owner.process.send_signal(signal.SIGCONT)
        time.sleep(0.1)
        assert bytes(pool.blocks) == before  # nothing arrives after the end


def test_a_stopped_owner_of_shared_memory_disturbs_no_reader_but_a_writer_ends_by_its_deadline() -> None:
    with PeerProcess() as owner, Agent("reader") as agent, SharedPool.create(2, 4096) as pool:
        region = agent.register(pool)
        session = agent.connect(owner.card)
        remote = session.blocks(owner.region_id, [9, 3], [1, 1])
        session.fetch(remote, region.blocks([0, 1])).require()
        stop(owner.process)
        session.fetch(remote, region.blocks([1, 0])).require()
        outcome = session.write(region.blocks([0, 1]), remote, 0.3).wait()
        assert set(outcome.verdicts) == {Verdict.LATE}


def test_a_killed_reader_frees_what_it_took() -> None:
    ends: list[str] = []
    with Agent("lender") as agent, SharedPool.create(8, 4096) as pool, agent.register(pool) as region, PeerProcess() as reader:
        offer = region.offer([1, 2], 60, lambda _, why: ends.append(why.reason))
        assert reader.ask("meet", base64.b64encode(agent.metadata()).decode()) == {"met": "shm"}
        assert reader.ask("take", offer.lease_id) == {"taken": offer.lease_id}
        until(lambda: agent.inbox.poll() is not None)
        assert region.pinned() == {1, 2}
        reader.process.send_signal(signal.SIGKILL)
        until(lambda: ends == ["peer lost"])
        assert region.pinned() == set()


def test_a_process_that_closes_nothing_exits_cleanly_and_leaves_nothing() -> None:
    with PeerProcess() as owner, Agent("reader") as agent, agent.connect(owner.card) as session:
        path = owner.card.unix_path
        assert os.path.exists(path)
        owner.tell("leave")
        assert owner.process.wait(20) == 0
        assert owner.process.stderr is not None
        assert owner.process.stderr.read() == b""
        assert not os.path.exists(path)
        until(lambda: session.is_lost)


def test_an_exit_in_the_middle_of_everything() -> None:
    script = """
import contextlib, threading
from polyphase.core.errors import HandleReleased
from polyphase.transfer import Agent, SharedPool
a, b = Agent("a"), Agent("b")
pool, other = SharedPool.create(64, 1 << 20), SharedPool.create(64, 1 << 20)
region, target = a.register(pool), b.register(other)
session = b.connect(a.card)
session.notify(b"never read")
def wait():
    with contextlib.suppress(HandleReleased):
        while True:
            a.notification()
for _ in range(2):
    threading.Thread(target=wait, daemon=True).start()
transfer = session.read(session.blocks(region.region_id, range(64), [1] * 64), target.blocks(range(64)))
offer = region.offer([1], 60, lambda *_: None)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.replace(b"\n", b"")[-300:]) == (0, b"")


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGSTOP, and wait until it stands still: it may run on for a moment on another core."""
    process.send_signal(signal.SIGSTOP)
    deadline_s = time.monotonic() + 20
    while Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


class TestStrangers:
    def test_without_the_token_nobody_is_let_in(self) -> None:
        with tcp_owner() as owner:
            for token, message in (
                (b"", "asks for a token"),
                (b"another token", "was not given, or is another"),
            ):
                with (
                    Agent("stranger", backends=[TcpBackend()], host="elsewhere", tcp_address="127.0.0.1:0", token=token) as stranger,
                    pytest.raises(TransferRefused, match=message),
                ):
                    stranger.connect(owner.card)

    def test_an_impostor_who_does_not_know_the_token_is_noticed(self) -> None:
        with (
            Agent("owner", epoch=5, backends=[TcpBackend()], host="a", tcp_address="127.0.0.1:0", token=b"wrong") as impostor,
            tcp_agent() as agent,
            pytest.raises(TransferRefused, match="token"),
        ):
            agent.connect(impostor.card)

    def test_another_life_and_another_name(self) -> None:
        import msgspec

        with tcp_owner() as owner, tcp_agent() as agent:
            for change in ({"epoch": 7}, {"agent_id": "somebody"}):
                with pytest.raises(StaleDescriptor, match="is gone; here is owner of epoch"):
                    agent.connect(msgspec.structs.replace(owner.card, **change))

    @pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\5hello", b"\xff\xff\xff\xff", b"", b"\0"])
    def test_noise_at_the_door_harms_nobody(self, noise: bytes) -> None:
        import socket

        with tcp_agent("owner") as owner, tcp_agent() as agent:
            host, _, port = owner.card.tcp_address.rpartition(":")
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(noise)
                with agent.connect(owner.card) as session:
                    session.notify(b"hello")
                    assert owner.notification(20).payload == b"hello"

    def test_many_callers_at_once(self) -> None:
        with Agent("owner") as owner, Agent("reader") as agent:
            sessions = [agent.connect(owner.card) for _ in range(40)]
            for session in sessions:
                session.notify(b"x")
            for _ in sessions:
                owner.notification(20)


async def test_the_event_loop_s_way() -> None:
    with PeerProcess() as owner, Agent("reader") as agent:
        region = agent.register(HostMemory(bytearray(2 * 4096), 4096))
        with await agent.connect_async(owner.card) as session:
            outcome = await session.read(session.blocks(owner.region_id, [9, 3], [1, 1]), region.blocks([0, 1]))
            assert outcome.require().byte_count == 8192
            session.agent.connect(agent.card).notify(b"to myself")
            notification = await agent.next_notification()
            assert (notification.payload, notification.sender.agent_id) == (b"to myself", "reader")
        with pytest.raises(WireError):
            await agent.connect_async(b"\x80")
