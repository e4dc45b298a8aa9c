"""Whatever the network does to the event stream, a listener ends up knowing what the worker holds, in all tiers."""

from __future__ import annotations

import logging

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from polyphase.runtime.fence import MAX_FRUITLESS_SNAPSHOTS, Fetch, FetchBatches, FetchPage, StreamFence
from polyphase.wire.events import (
    AllCleared,
    BlocksRemoved,
    BlocksStored,
    EventBatch,
    KvEvent,
    Load,
    MissedBatches,
    SnapshotPage,
    Tier,
    TierDigest,
)
from tests.unit.runtime.world import Held, Mirror, Worker

SECOND = 10**9
TIERS = st.sampled_from([Tier.DEVICE, Tier.DEVICE, Tier.HOST, Tier.OBJECT])
HASHES = st.lists(st.integers(0, 20), min_size=1, max_size=5)
EVENT = st.one_of(st.builds(BlocksStored, HASHES, TIERS), st.builds(BlocksRemoved, HASHES, TIERS), st.just(AllCleared()))
EVENTS = st.lists(EVENT, max_size=3)


def decoded(data: bytes) -> EventBatch:
    return msgspec.msgpack.decode(data, type=EventBatch)


def answer(worker: Worker, fetch: Fetch) -> SnapshotPage | MissedBatches:
    return worker.source.page(fetch.cursor) if isinstance(fetch, FetchPage) else worker.source.missed(fetch.after)


def give(fence: StreamFence, told: SnapshotPage | MissedBatches, now_ns: int) -> Fetch | None:
    if isinstance(told, SnapshotPage):
        return fence.on_page(told, now_ns)
    return fence.on_missed([decoded(bytes(one)) for one in told.batches], now_ns)


def feed(fence: StreamFence, worker: Worker, fetch: Fetch | None, now_ns: int) -> list[Fetch]:
    """Answer what the fence wants until it wants no more; what that was."""
    wanted = []
    while fetch is not None:
        wanted.append(fetch)
        fetch = give(fence, answer(worker, fetch), now_ns)
    return wanted


class LossyNetwork(RuleBasedStateMachine):
    """Batches in flight may be delivered in any order, twice or never; answers take their time; the worker may restart at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.now_ns = 0
        self.worker = Worker(epoch=1)
        self.mirror = Mirror()
        self.fence = StreamFence("w", 1, self.mirror)
        self.in_flight: list[EventBatch] = []
        self.wanted: Fetch | None = self.fence.begin(0)
        self.answer: SnapshotPage | MissedBatches | None = None
        self.history: dict[int, Held] = {}  # what the present life held after each sequence number
        self.remember()

    def remember(self) -> None:
        self.history[self.worker.sequence] = {tier: set(blocks) for tier, blocks in self.worker.held.items()}

    def publish_batch(self, events: list[KvEvent]) -> EventBatch:
        batch = decoded(self.worker.publish(events))
        self.remember()
        return batch

    def take(self, batch: EventBatch) -> None:
        fetch = self.fence.on_batch(batch, self.now_ns)
        if fetch is not None:
            assert self.wanted is None  # one fetch at a time
            self.wanted = fetch

    @rule(events=EVENTS)
    def publish(self, events: list[KvEvent]) -> None:
        self.in_flight.append(self.publish_batch(events))

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), is_kept=st.booleans())
    def deliver(self, data: st.DataObject, is_kept: bool) -> None:
        place = data.draw(st.integers(0, len(self.in_flight) - 1))
        self.take(self.in_flight[place] if is_kept else self.in_flight.pop(place))

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))

    @precondition(lambda self: self.wanted is not None and self.answer is None)
    @rule()
    def the_worker_answers(self) -> None:
        assert self.wanted is not None
        self.answer = answer(self.worker, self.wanted)

    @precondition(lambda self: self.answer is not None)
    @rule()
    def the_answer_arrives(self) -> None:
        assert self.answer is not None
        self.wanted, self.answer = give(self.fence, self.answer, self.now_ns), None

    @precondition(lambda self: self.wanted is not None)
    @rule()
    def the_fetch_fails(self) -> None:
        self.answer = self.wanted = None
        self.fence.on_fetch_failed()

    @rule(seconds=st.integers(1, 20))
    def time_passes(self, seconds: int) -> None:
        self.now_ns += seconds * SECOND

    @rule()
    def the_worker_restarts(self) -> None:
        """The registry tells of the new life, later than the first batches of it may arrive; those of the old one are still in flight."""
        self.worker = Worker(self.worker.epoch + 1)
        self.history = {}
        self.remember()
        self.take(self.publish_batch([BlocksStored([99])]))
        self.fence = StreamFence("w", self.worker.epoch, self.mirror)
        self.mirror.held, self.mirror.step = Mirror().held, -1
        self.answer, self.wanted = None, self.fence.begin(self.now_ns)

    @invariant()
    def a_synced_mirror_holds_what_the_worker_held_at_that_point(self) -> None:
        if self.fence.is_synced:
            assert self.fence._sequence is not None
            assert self.mirror.held == self.history[self.fence._sequence]

    @invariant()
    def nothing_drifts(self) -> None:
        assert self.fence.counts.drifts == 0

    def teardown(self) -> None:
        """After the next heartbeat that arrives, and what it leads to, the mirror shows the truth."""
        if self.wanted is not None:
            feed(self.fence, self.worker, self.wanted, self.now_ns)
            self.wanted = None
        self.now_ns += 60 * SECOND
        self.take(self.publish_batch([]))
        feed(self.fence, self.worker, self.wanted, self.now_ns)
        assert self.fence.is_synced
        assert self.mirror.held == self.worker.held
        assert self.mirror.step == self.worker.sequence - 1


TestLossyNetwork = LossyNetwork.TestCase
TestLossyNetwork.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(EVENTS, min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_an_undisturbed_stream_needs_one_snapshot(batches: list[list[KvEvent]]) -> None:
    worker, mirror = Worker(1), Mirror()
    fence = StreamFence("w", 1, mirror)
    feed(fence, worker, fence.begin(0), 0)
    for events in batches:
        assert fence.on_batch(decoded(worker.publish(events)), 0) is None
        assert mirror.held == worker.held
    assert (mirror.reset_count, fence.counts.snapshots, fence.counts.gaps) == (1, 1, 0)


def synced() -> tuple[Worker, Mirror, StreamFence]:
    worker, mirror = Worker(1), Mirror()
    worker.publish([BlocksStored([1, 2, 3]), BlocksStored([3, 4], Tier.HOST)])
    fence = StreamFence("w", 1, mirror)
    feed(fence, worker, fence.begin(0), 0)
    assert fence.is_synced
    return worker, mirror, fence


def test_a_gap_is_closed_with_the_batches_that_are_missing() -> None:
    worker, mirror, fence = synced()
    for _ in range(3):
        worker.publish([BlocksRemoved([2])])
    assert feed(fence, worker, fence.on_batch(decoded(worker.publish([BlocksStored([9])])), 0), 0) == [FetchBatches(1)]
    assert mirror.held == worker.held
    assert (fence.counts.gaps, fence.counts.repairs, fence.counts.snapshots) == (1, 1, 1)


def test_a_gap_that_is_too_wide_takes_a_snapshot() -> None:
    worker, mirror, fence = synced()
    for number in range(10):  # more than this worker keeps
        worker.publish([BlocksStored([number])])
    wanted = feed(fence, worker, fence.on_batch(decoded(worker.publish([])), SECOND), SECOND)
    assert wanted[:2] == [FetchBatches(1), FetchPage(None)]
    assert len(wanted) > 3, "several pages"
    assert mirror.held == worker.held
    assert fence.is_synced


def test_late_batches_close_a_gap_without_an_answer() -> None:
    worker, mirror, fence = synced()
    first, second = (decoded(worker.publish([BlocksStored([number])])) for number in (7, 8))
    wanted = fence.on_batch(second, 0)
    assert wanted == FetchBatches(1)
    assert fence.on_batch(first, 0) is None
    assert fence.is_synced
    assert mirror.held == worker.held
    assert fence.on_missed([first, second], 0) is None


def test_a_worker_that_does_not_know_the_question_is_asked_for_everything() -> None:
    worker, _, fence = synced()
    worker.publish([])
    assert fence.on_batch(decoded(worker.publish([])), SECOND) == FetchBatches(1)
    fence.on_fetch_failed()
    assert fence.on_batch(decoded(worker.publish([])), SECOND) == FetchPage(None)


def test_blocks_come_and_go_between_the_pages_of_a_snapshot() -> None:
    worker, mirror = Worker(1), Mirror()
    worker.publish([BlocksStored(list(range(30))), BlocksStored([50, 51], Tier.DISK)])
    fence = StreamFence("w", 1, mirror)
    fetch, changes = fence.begin(0), 0
    while fetch is not None:
        fetch = give(fence, answer(worker, fetch), 0)
        assert not fence.is_synced or fetch is None
        gone = BlocksRemoved([changes, 29 - changes])
        events: list[KvEvent] = [gone, BlocksStored([100 + changes], Tier.HOST), BlocksStored([200 + changes, changes])]
        assert fence.on_batch(decoded(worker.publish(events)), 0) is None
        changes += 1
    assert changes > 5
    assert mirror.held == worker.held
    assert (fence.is_synced, fence.counts.drifts) == (True, 0)


def test_a_snapshot_of_another_life_is_not_used() -> None:
    mirror = Mirror()
    fence = StreamFence("w", 1, mirror)
    assert fence.begin(0) == FetchPage(None)
    assert fence.on_page(Worker(2).source.page(None), 0) is None
    assert (fence.is_synced, mirror.reset_count) == (False, 0)
    batch = decoded(Worker(1).publish([]))
    assert fence.on_batch(batch, 0) is None, "too early"
    assert fence.on_batch(batch, SECOND) == FetchPage(None)


@pytest.mark.parametrize(
    "page",
    [
        SnapshotPage("w", 1, 0, {Tier.DEVICE: b"1234567"}),
        SnapshotPage("w", 1, 0, {}, "again"),
    ],
)
def test_a_snapshot_that_makes_no_sense_is_not_used(page: SnapshotPage, caplog: pytest.LogCaptureFixture) -> None:
    mirror = Mirror()
    fence = StreamFence("w", 1, mirror)
    fence.begin(0)
    fetch = fence.on_page(page, 0)
    if fetch is not None:
        fetch = fence.on_page(page, 0)
    assert fetch is None
    assert not fence.is_synced
    assert "of no use" in caplog.text


def test_a_listener_that_cannot_fetch_keeps_a_bounded_number_of_batches() -> None:
    worker, mirror = Worker(1, kept_batches=10_000), Mirror()
    fence = StreamFence("w", 1, mirror)
    wanted = fence.begin(0)
    assert wanted is not None
    early = answer(worker, wanted)
    for number in range(9_000):
        fence.on_batch(decoded(worker.publish([BlocksStored([number])])), 0)
    assert len(fence._buffer) < 5_000
    assert feed(fence, worker, give(fence, early, 0), 0)[0] == FetchBatches(0)
    assert mirror.held == worker.held


def test_a_worker_without_digests_and_tiers_in_snapshots_still_works() -> None:
    """As the first version's was."""
    mirror = Mirror()
    fence = StreamFence("w", 1, mirror)
    assert fence.begin(0) == FetchPage(None)
    old = {"type": "snapshot", "worker_id": "w", "epoch": 1, "sequence": 4, "device_hashes": [1, 2]}
    assert fence.on_page(msgspec.msgpack.decode(msgspec.msgpack.encode(old), type=SnapshotPage), 0) is None
    batch = {"worker_id": "w", "epoch": 1, "sequence": 5, "events": [{"type": "stored", "sequence_hashes": [3]}], "load": {}}
    assert fence.on_batch(decoded(msgspec.msgpack.encode(batch)), 0) is None
    assert mirror.held[Tier.DEVICE] == {1, 2, 3}
    mirror.held[Tier.DEVICE].add(4)
    assert fence.on_batch(EventBatch("w", 1, 6, [], Load()), 0) is None
    assert fence.is_synced


class TestDrift:
    def test_it_is_told_once_and_mended(self, caplog: pytest.LogCaptureFixture) -> None:
        worker, mirror, fence = synced()
        mirror.held[Tier.HOST].discard(3)
        heartbeat = decoded(worker.publish([]))
        with caplog.at_level(logging.WARNING):
            wanted = fence.on_batch(heartbeat, SECOND)
            assert not fence.is_synced
            assert fence.on_batch(decoded(worker.publish([])), SECOND) is None
        assert [record.message for record in caplog.records] == [
            "worker w: what is known of its blocks has drifted (host: knows 1 blocks, told 2); a snapshot will mend it"
        ]
        feed(fence, worker, wanted, SECOND)
        assert mirror.held == worker.held
        assert (fence.is_synced, fence.counts.drifts, fence.counts.snapshots) == (True, 1, 2)

    def test_the_same_number_of_other_blocks_is_noticed(self) -> None:
        worker, mirror, fence = synced()
        mirror.held[Tier.DEVICE] ^= {3, 33}
        assert fence.on_batch(decoded(worker.publish([])), SECOND) == FetchPage(None)

    def test_digests_that_no_snapshot_makes_agree_are_given_up(self, caplog: pytest.LogCaptureFixture) -> None:
        worker, _, fence = synced()
        snapshots = 0
        for number in range(10):
            now_ns = number * 100 * SECOND
            batch = decoded(worker.publish([]))
            batch = msgspec.structs.replace(batch, digests={Tier.DEVICE: TierDigest(3, 12345)})
            snapshots += bool(feed(fence, worker, fence.on_batch(batch, now_ns), now_ns))
        assert snapshots == MAX_FRUITLESS_SNAPSHOTS
        assert fence.is_synced
        assert "not looked at in this life" in caplog.text

    def test_a_sink_that_cannot_tell_is_left_alone(self) -> None:
        worker, mirror, fence = synced()
        mirror.held[Tier.DEVICE].clear()
        mirror.digests = lambda worker_id, epoch: None  # type: ignore[method-assign]
        assert fence.on_batch(decoded(worker.publish([])), SECOND) is None

    def test_tiers_that_hold_nothing_may_be_named(self) -> None:
        worker, _, fence = synced()
        batch = decoded(worker.publish([]))
        assert batch.digests is not None
        batch = msgspec.structs.replace(batch, digests={**batch.digests, Tier.DISK: TierDigest(0, 0)})
        assert fence.on_batch(batch, SECOND) is None
