"""The tests that every backend of the transfer library must pass, for ours and for yours. Needs pytest.

    from polyphase.testing.transfer import TransferConformance, ThreadWorld

    class TestMyBackend(TransferConformance):
        @pytest.fixture
        def world(self):
            with ThreadWorld(lambda: [MyBackend()]) as world:
                yield world

A *world* makes agents and memory, and lets messages arrive. Another one than `ThreadWorld` is needed for memory that is not the
processor's, or for time that does not pass by itself.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, Self

import msgspec
import pytest

from polyphase.core.errors import (
    ForeignDescriptor,
    HandleReleased,
    KvError,
    PeerLost,
    StaleDescriptor,
    TransferError,
    TransferRefused,
    TransferTimeout,
)
from polyphase.transfer import Agent, BlockMemory, LocalBlocks, Outcome, Region, RemoteBlocks, Session, SharedPool, Transfer, Verdict
from polyphase.transfer.backends.interface import Backend
from polyphase.transfer.blocks import HostBlocks

BLOCK_BYTES = 4096
BLOCK_COUNT = 64


class World(Protocol):
    """Where agents meet. Owner of everything that it makes."""

    def agent(self, name: str) -> Agent:
        """A new life of this name."""

    def memory(self, block_count: int = BLOCK_COUNT, block_bytes: int = BLOCK_BYTES) -> BlockMemory:
        """That peers can reach through the backend under test."""

    def put(self, memory: BlockMemory, block_id: int, content: bytes) -> None: ...

    def get(self, memory: BlockMemory, block_id: int) -> bytes: ...

    def until(self, condition: Callable[[], bool]) -> None:
        """Let time pass until the condition holds. Raises: AssertionError if it does not within a generous time."""


class ThreadWorld:
    """Agents with threads and sockets, host memory, real time."""

    def __init__(
        self, backends: Callable[[], Sequence[Backend]], memory: Callable[[int, int], Any] = SharedPool.create, **options: Any
    ) -> None:
        """`options` go to each agent; one that is callable is given the agent's name, for what must differ."""
        self._backends = backends
        self._memory = memory
        self._options = options
        self._stack = ExitStack()

    def agent(self, name: str) -> Agent:
        options = {key: value(name) if callable(value) else value for key, value in self._options.items()}
        return self._stack.enter_context(Agent(name, backends=self._backends(), **options))

    def memory(self, block_count: int = BLOCK_COUNT, block_bytes: int = BLOCK_BYTES) -> BlockMemory:
        memory: BlockMemory = self._memory(block_count, block_bytes)
        if hasattr(memory, "close"):
            self._stack.callback(memory.close)
        return memory

    def put(self, memory: BlockMemory, block_id: int, content: bytes) -> None:
        assert isinstance(memory, HostBlocks)
        memory.blocks[block_id * memory.block_bytes : (block_id + 1) * memory.block_bytes] = content

    def get(self, memory: BlockMemory, block_id: int) -> bytes:
        assert isinstance(memory, HostBlocks)
        return bytes(memory.blocks[block_id * memory.block_bytes : (block_id + 1) * memory.block_bytes])

    def until(self, condition: Callable[[], bool]) -> None:
        end_s = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end_s, "waited 20 s in vain"
            time.sleep(0.002)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()


class Side:
    """An agent with a registered memory whose blocks hold what `content` says."""

    def __init__(self, world: World, name: str, block_count: int = BLOCK_COUNT, block_bytes: int = BLOCK_BYTES) -> None:
        self.world = world
        self.agent = world.agent(name)
        self.memory = world.memory(block_count, block_bytes)
        self.region: Region = self.agent.register(self.memory)
        self._seed = name
        for block_id in range(block_count):
            world.put(self.memory, block_id, self.content(block_id))

    def content(self, block_id: int) -> bytes:
        return random.Random(f"{self._seed}{block_id}").randbytes(self.memory.block_bytes)

    def get(self, block_id: int) -> bytes:
        return self.world.get(self.memory, block_id)


class Meeting:
    """`reader` has a session with `owner`."""

    def __init__(self, world: World, block_count: int = BLOCK_COUNT, block_bytes: int = BLOCK_BYTES) -> None:
        self.owner = Side(world, "owner", block_count, block_bytes)
        self.reader = Side(world, "reader", block_count, block_bytes)
        self.session: Session = self.reader.agent.connect(self.owner.agent.metadata())

    def remote(self, block_ids: Sequence[int]) -> RemoteBlocks:
        region = self.owner.region
        return self.session.blocks(region.region_id, block_ids, region.generations(block_ids))

    def local(self, block_ids: Sequence[int]) -> LocalBlocks:
        return self.reader.region.blocks(block_ids)


class TransferConformance:
    """Subclass it with a fixture `world`."""

    @pytest.fixture
    def meeting(self, world: World) -> Meeting:
        return Meeting(world)

    # Blocks.

    def test_scattered_blocks_are_read(self, meeting: Meeting) -> None:
        sources, targets = [9, 3, 60, 4, 5], [0, 63, 7, 8, 30]
        outcome = meeting.session.read(meeting.remote(sources), meeting.local(targets)).wait()
        assert outcome.is_done, outcome.explain()
        assert outcome.byte_count == 5 * BLOCK_BYTES
        for source, target in zip(sources, targets, strict=True):
            assert meeting.reader.get(target) == meeting.owner.content(source)
        untouched = set(range(BLOCK_COUNT)) - set(targets)
        assert all(meeting.reader.get(block_id) == meeting.reader.content(block_id) for block_id in untouched)

    def test_scattered_blocks_are_written(self, meeting: Meeting) -> None:
        sources, targets = [9, 3, 60, 4, 5], [0, 63, 7, 8, 30]
        outcome = meeting.session.write(meeting.local(sources), meeting.remote(targets)).wait()
        assert outcome.is_done, outcome.explain()
        for source, target in zip(sources, targets, strict=True):
            assert meeting.owner.get(target) == meeting.reader.content(source)
        untouched = set(range(BLOCK_COUNT)) - set(targets)
        assert all(meeting.owner.get(block_id) == meeting.owner.content(block_id) for block_id in untouched)

    def test_one_block_may_be_read_into_many(self, meeting: Meeting) -> None:
        assert meeting.session.fetch(meeting.remote([5] * 6), meeting.local(range(6))).is_done
        assert {meeting.reader.get(block_id) for block_id in range(6)} == {meeting.owner.content(5)}

    def test_lists_are_used_again_and_in_parts(self, meeting: Meeting) -> None:
        remote, local = meeting.remote(range(40)), meeting.local(range(39, -1, -1))
        for part in (slice(0, 10), slice(10, 40), slice(0, 40), slice(3, 4)):
            assert meeting.session.read(remote[part], local[part]).wait().is_done
        assert all(meeting.reader.get(39 - block_id) == meeting.owner.content(block_id) for block_id in range(40))

    @pytest.mark.parametrize(("block_count", "block_bytes"), [(1000, 128), (3, 3 << 20), (30, 70_001)])
    def test_sizes(self, world: World, block_count: int, block_bytes: int) -> None:
        meeting = Meeting(world, block_count, block_bytes)
        order = random.Random(1).sample(range(block_count), block_count)
        assert meeting.session.read(meeting.remote(order), meeting.local(range(block_count))).wait().is_done
        assert all(meeting.reader.get(place) == meeting.owner.content(block_id) for place, block_id in enumerate(order))

    def test_many_transfers_at_once(self, meeting: Meeting) -> None:
        transfers = [meeting.session.read(meeting.remote([n, n + 1]), meeting.local([n, n + 1])) for n in range(0, BLOCK_COUNT, 2)]
        assert all(transfer.wait().is_done for transfer in transfers)
        assert all(meeting.reader.get(block_id) == meeting.owner.content(block_id) for block_id in range(BLOCK_COUNT))

    def test_both_directions_at_once(self, meeting: Meeting) -> None:
        back = meeting.owner.agent.connect(meeting.reader.agent.metadata())
        there = meeting.session.read(meeting.remote(range(30)), meeting.local(range(30, 60)))
        region = meeting.reader.region
        source = back.blocks(region.region_id, range(30), region.generations(range(30)))
        here = back.read(source, meeting.owner.region.blocks(range(30, 60)))
        assert there.wait().is_done
        assert here.wait().is_done
        assert all(meeting.owner.get(30 + block_id) == meeting.reader.content(block_id) for block_id in range(30))

    # Verdicts.

    def test_only_blocks_that_changed_are_stale(self, meeting: Meeting) -> None:
        remote = meeting.remote(range(10))
        meeting.owner.region.renew([3, 7])
        outcome = meeting.session.read(remote, meeting.local(range(10))).wait()
        assert outcome.failed_places() == [3, 7]
        assert {outcome.verdicts[3], outcome.verdicts[7]} == {Verdict.STALE}
        assert meeting.reader.get(8) == meeting.owner.content(8)
        with pytest.raises(StaleDescriptor, match="of 10 blocks 2 given to other content"):
            outcome.require()

    def test_a_write_spares_blocks_that_are_no_longer_ours(self, meeting: Meeting) -> None:
        remote = meeting.remote(range(10))
        meeting.owner.region.renew([3, 7])
        outcome = meeting.session.write(meeting.local(range(10)), remote).wait()
        assert outcome.failed_places() == [3, 7]
        assert meeting.owner.get(3) == meeting.owner.content(3)
        assert meeting.owner.get(4) == meeting.reader.content(4)

    def test_a_released_region_gives_nothing(self, meeting: Meeting) -> None:
        remote = meeting.remote(range(4))
        meeting.owner.region.release()
        outcome = meeting.session.read(remote, meeting.local(range(4))).wait()
        assert set(outcome.verdicts) == {Verdict.STALE}, outcome.explain()

    def test_a_region_nobody_has_is_stale(self, meeting: Meeting) -> None:
        made_up = msgspec.structs.replace(meeting.owner.region.card, region_id="f" * 32)
        meeting.session.region(made_up)
        outcome = meeting.session.read(meeting.session.blocks("f" * 32, [1], [1]), meeting.local([1])).wait()
        assert not outcome.is_done
        with pytest.raises(StaleDescriptor):
            outcome.require()

    # Ends.

    @pytest.mark.parametrize("direction", ["read", "write"])
    def test_a_deadline_that_has_passed(self, meeting: Meeting, direction: str) -> None:
        transfer = self.post(meeting, direction, range(20), timeout_s=0)
        outcome = transfer.wait()
        assert set(outcome.verdicts) <= {Verdict.LATE, Verdict.DONE}
        if not outcome.is_done:
            with pytest.raises(TransferTimeout):
                outcome.require()

    @pytest.mark.parametrize("direction", ["read", "write"])
    def test_cancelling_ends_it(self, meeting: Meeting, direction: str) -> None:
        transfer = self.post(meeting, direction, range(BLOCK_COUNT))
        transfer.cancel()
        transfer.cancel()
        assert set(transfer.wait().verdicts) <= {Verdict.CANCELLED, Verdict.DONE}
        assert transfer.poll()

    def test_after_its_release_nothing_is_written(self, meeting: Meeting) -> None:
        with meeting.session.read(meeting.remote(range(BLOCK_COUNT)), meeting.local(range(BLOCK_COUNT))):
            pass
        before = [meeting.reader.get(block_id) for block_id in range(BLOCK_COUNT)]
        meeting.reader.world.until(_ticks(3))
        assert [meeting.reader.get(block_id) for block_id in range(BLOCK_COUNT)] == before

    def test_releasing_the_own_region_ends_its_transfers(self, meeting: Meeting) -> None:
        transfer = self.post(meeting, "read", range(BLOCK_COUNT))
        meeting.reader.region.release()
        assert transfer.poll()

    def test_releasing_the_session_ends_its_transfers(self, meeting: Meeting) -> None:
        transfer = self.post(meeting, "read", range(BLOCK_COUNT))
        meeting.session.release()
        assert transfer.poll()

    def test_closing_the_agent_ends_everything(self, meeting: Meeting) -> None:
        transfer = self.post(meeting, "read", range(BLOCK_COUNT))
        meeting.reader.agent.close()
        meeting.reader.agent.close()
        assert transfer.poll()
        with pytest.raises(HandleReleased):
            meeting.reader.agent.connect(meeting.owner.agent.card)

    def test_a_transfer_with_an_agent_that_left_ends(self, meeting: Meeting) -> None:
        """Blocks that are still mapped may be good; whatever is not, fails."""
        remote = meeting.remote(range(8))
        meeting.owner.agent.close()
        outcome = meeting.session.read(remote, meeting.local(range(8))).wait()
        assert set(outcome.verdicts) <= {Verdict.DONE, Verdict.LOST, Verdict.STALE}
        meeting.reader.world.until(lambda: meeting.session.is_lost)
        with pytest.raises(PeerLost):
            meeting.session.notify(b"hello")
        with pytest.raises((PeerLost, StaleDescriptor, TransferRefused)):
            meeting.reader.agent.connect(meeting.owner.agent.card)

    def test_a_later_life_refuses_what_was_said_of_the_earlier(self, world: World) -> None:
        meeting = Meeting(world)
        card, offer = meeting.owner.agent.card, meeting.owner.region.offer([1], 60)
        meeting.owner.agent.close()
        later = world.agent("owner")
        with pytest.raises((StaleDescriptor, PeerLost, TransferRefused)):
            meeting.reader.agent.connect(card)
        session = meeting.reader.agent.connect(later.card)
        with pytest.raises(ForeignDescriptor, match="the offer is of agent owner, epoch"):
            session.take(offer)

    # Leases.

    def test_an_offer_is_read_and_given_back(self, meeting: Meeting) -> None:
        ends: list[str] = []
        region = meeting.owner.region
        offer = region.offer([4, 9], 60, lambda _, why: ends.append(why.reason))
        assert region.pinned() == {4, 9}
        with pytest.raises(KvError, match="block 9 is under lease"):
            region.renew([9])
        assert meeting.session.read(meeting.session.take(offer), meeting.local([0, 1])).wait().is_done
        meeting.session.give_back(offer.lease_id)
        meeting.session.give_back(offer.lease_id)
        meeting.reader.world.until(lambda: bool(ends))
        assert ends == ["released"]
        assert region.pinned() == set()
        region.renew([4, 9])

    def test_a_reader_that_goes_away_frees_what_it_took(self, meeting: Meeting) -> None:
        ends: list[str] = []
        taken = meeting.owner.region.offer([1], 60, lambda _, why: ends.append(why.reason))
        meeting.owner.region.offer([2], 60, lambda _, why: ends.append(why.reason))
        meeting.session.take(taken)
        meeting.session.release()
        meeting.reader.world.until(lambda: bool(ends))
        assert ends == ["peer lost"]
        assert meeting.owner.region.pinned() == {2}

    def test_a_lease_that_two_readers_took_ends_with_the_last(self, meeting: Meeting) -> None:
        ends: list[str] = []
        offer = meeting.owner.region.offer([1], 60, lambda _, why: ends.append(why.reason))
        other = meeting.reader.agent.connect(meeting.owner.agent.card)
        meeting.session.take(offer)
        other.take(offer)
        other.notify(b"taken")
        meeting.session.notify(b"taken")
        for _ in range(2):
            meeting.owner.agent.notification(20)
        meeting.reader.world.until(_ticks(3))
        meeting.session.release()
        meeting.reader.world.until(_ticks(3))
        assert not ends
        other.release()
        meeting.reader.world.until(lambda: ends == ["peer lost"])

    def test_a_lease_runs_out(self, meeting: Meeting) -> None:
        ends: list[str] = []
        meeting.owner.region.offer([1], 0.05, lambda _, why: ends.append(why.reason))
        meeting.owner.region.offer([2], 60)
        meeting.reader.world.until(lambda: ends == ["expired"])
        assert meeting.owner.region.pinned() == {2}

    def test_a_released_region_ends_its_leases(self, meeting: Meeting) -> None:
        ends: list[str] = []
        meeting.owner.region.offer([1], 60, lambda _, why: ends.append(why.reason))
        meeting.owner.region.release()
        assert ends == ["region released"]
        assert len(meeting.owner.agent.lending) == 0

    # Notifications.

    def test_notifications_come_in_order_and_can_be_answered(self, meeting: Meeting) -> None:
        for number in range(20):
            meeting.session.notify(b"%d" % number)
        got = [meeting.owner.agent.notification(20) for _ in range(20)]
        assert [notification.payload for notification in got] == [b"%d" % number for number in range(20)]
        assert {notification.sender.agent_id for notification in got} == {"reader"}
        got[0].reply(b"thanks")
        answer = meeting.reader.agent.notification(20)
        assert (answer.payload, answer.sender.agent_id) == (b"thanks", "owner")

    def test_a_transfer_notifies_when_its_blocks_are_good_and_only_then(self, meeting: Meeting) -> None:
        remote = meeting.remote([1, 2])
        stale = meeting.remote([3])
        meeting.owner.region.renew([3])
        assert not meeting.session.read(stale, meeting.local([3]), notify=b"never").wait().is_done
        assert meeting.session.write(meeting.local([8, 9]), remote, notify=b"written").wait().is_done
        assert meeting.owner.agent.notification(20).payload == b"written"
        assert meeting.owner.get(1) == meeting.reader.content(8)

    def test_too_long_a_notification_is_refused(self, meeting: Meeting) -> None:
        meeting.session.notify(b"x" * 60_000)
        with pytest.raises(TransferError, match="bytes cannot be sent"):
            meeting.session.notify(b"x" * 70_000)
        assert len(meeting.owner.agent.notification(20).payload) == 60_000

    def test_no_notification_in_time(self, meeting: Meeting) -> None:
        with pytest.raises(TransferTimeout, match="no notification came"):
            meeting.owner.agent.notification(0.01)

    # Misuse.

    def test_a_second_release_and_a_use_after_it(self, meeting: Meeting) -> None:
        transfer = self.post(meeting, "read", [1])
        remote, local = meeting.remote([1]), meeting.local([1])
        transfer.wait()
        for handle in (transfer, meeting.reader.region, meeting.session):
            handle.release()
            with pytest.raises(HandleReleased, match="was released before"):
                handle.release()
        for use in (
            transfer.poll,
            transfer.wait,
            transfer.cancel,
            lambda: meeting.reader.region.blocks([1]),
            lambda: meeting.session.read(remote, local),
            lambda: meeting.session.notify(b"x"),
            lambda: meeting.session.give_back("x"),
        ):
            with pytest.raises(HandleReleased):
                use()

    def test_a_released_region_is_no_target(self, meeting: Meeting) -> None:
        local = meeting.local([1])
        meeting.reader.region.release()
        with pytest.raises(HandleReleased):
            meeting.session.read(meeting.remote([1]), local)

    def test_foreign_descriptors(self, world: World, meeting: Meeting) -> None:
        other = Meeting(world)
        narrow = Side(world, "narrow", 4, 128)
        remote, local = meeting.remote([1]), meeting.local([1])
        for use, message in (
            (lambda: meeting.local([BLOCK_COUNT]), f"block {BLOCK_COUNT} does not exist: .* has blocks 0 to {BLOCK_COUNT - 1}"),
            (lambda: meeting.local([-1]), "whole numbers from 0"),
            (lambda: meeting.session.blocks("no such", [1], [1]), "has no region no such"),
            (lambda: meeting.session.blocks(meeting.owner.region.region_id, [BLOCK_COUNT], [1]), "does not exist"),
            (lambda: meeting.session.blocks(meeting.owner.region.region_id, [1, 2], [1]), "2 blocks were described with 1"),
            (lambda: meeting.session.read(other.remote([1]), local), "another session"),
            (lambda: meeting.session.read(remote, other.local([1])), "another agent"),
            (lambda: meeting.session.read(remote, meeting.local([1, 2])), "do not fit each other"),
            (lambda: meeting.session.read(remote, narrow.region.blocks([1])), "another agent"),
            (lambda: meeting.session.read(meeting.remote([]), meeting.local([])), "at least one block"),
            (lambda: meeting.owner.agent.register(meeting.owner.memory), "registered already|no backend"),
        ):
            if use is not None:
                with pytest.raises(ForeignDescriptor, match=message):
                    use()

    def test_blocks_of_another_size_are_refused(self, world: World, meeting: Meeting) -> None:
        narrow = meeting.reader.agent.register(world.memory(4, 128))
        with pytest.raises(ForeignDescriptor, match="other shapes"):
            meeting.session.read(meeting.remote([1]), narrow.blocks([1]))

    def test_it_says_why_it_was_chosen(self, meeting: Meeting) -> None:
        chosen = [line for line in meeting.session.why().splitlines() if line.startswith(f"{meeting.session.backend}: chosen: ")]
        assert len(chosen) == 1

    def post(self, meeting: Meeting, direction: str, block_ids: Sequence[int], timeout_s: float = 20) -> Transfer:
        if direction == "read":
            return meeting.session.read(meeting.remote(block_ids), meeting.local(block_ids), timeout_s)
        return meeting.session.write(meeting.local(block_ids), meeting.remote(block_ids), timeout_s)


def transfer_threads() -> list[str]:
    """Names of living threads of the library; none when every agent is closed."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("transfer-", "fiber"))]


def _ticks(count: int) -> Callable[[], bool]:
    """A condition that holds after it was looked at a few times."""
    left = iter(range(count))
    return lambda: next(left, None) is None


__all__ = ["Meeting", "Outcome", "Side", "ThreadWorld", "TransferConformance", "World", "transfer_threads"]
