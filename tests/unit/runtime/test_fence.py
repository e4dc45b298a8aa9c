"""Whatever the network does to the event stream, a listener ends up knowing what the worker holds."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from polyphase.runtime.fence import StreamFence
from polyphase.wire.events import AllCleared, BlocksRemoved, BlocksStored, EventBatch, KvEvent, Load
from polyphase.wire.requests import Snapshot


class Mirror:
    """An EventSink that follows one worker, as a prefix index does."""

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.step = -1
        self.snapshot_count = 0

    def on_snapshot(self, worker_id: str, epoch: int, hashes: list[int]) -> None:
        self.held = set(hashes)
        self.snapshot_count += 1

    def on_events(self, worker_id: str, epoch: int, events: list[KvEvent]) -> None:
        apply(self.held, events)

    def on_load(self, worker_id: str, epoch: int, load: Load) -> None:
        assert load.step >= self.step  # loads never go back within a life
        self.step = load.step


def apply(held: set[int], events: list[KvEvent]) -> None:
    for event in events:
        match event:
            case BlocksStored(sequence_hashes=hashes):
                held.update(hashes)
            case BlocksRemoved(sequence_hashes=hashes):
                held.difference_update(hashes)
            case AllCleared():
                held.clear()


class Worker:
    """The truth: one life of a worker."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.sequence = 0
        self.held: set[int] = set()

    def publish(self, events: list[KvEvent]) -> EventBatch:
        apply(self.held, events)
        self.sequence += 1
        return EventBatch("w", self.epoch, self.sequence, events, Load(step=self.sequence))

    def snapshot(self) -> Snapshot:
        return Snapshot("w", self.epoch, self.sequence, sorted(self.held))


hashes = st.lists(st.integers(0, 20), min_size=1, max_size=5)
events = st.lists(st.one_of(hashes.map(BlocksStored), hashes.map(BlocksRemoved), st.just(AllCleared())), max_size=3)


class LossyNetwork(RuleBasedStateMachine):
    """Batches in flight may be delivered in any order, twice or never; snapshots take their time; the worker may restart at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.worker = Worker(epoch=1)
        self.mirror = Mirror()
        self.fence = StreamFence("w", 1, self.mirror)
        self.in_flight: list[EventBatch] = []
        self.answer: Snapshot | None = None
        self.is_fetching = False
        self.history: dict[int, set[int]] = {0: set()}  # what the present life held after each sequence number

    def publish_batch(self, batch_events: list[KvEvent]) -> EventBatch:
        batch = self.worker.publish(batch_events)
        self.history[batch.sequence] = set(self.worker.held)
        return batch

    def take(self, batch: EventBatch) -> None:
        if self.fence.on_batch(batch):
            assert not self.is_fetching  # one fetch at a time
            self.is_fetching = True

    @rule(batch_events=events)
    def publish(self, batch_events: list[KvEvent]) -> None:
        self.in_flight.append(self.publish_batch(batch_events))

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), is_kept=st.booleans())
    def deliver(self, data: st.DataObject, is_kept: bool) -> None:
        place = data.draw(st.integers(0, len(self.in_flight) - 1))
        batch = self.in_flight[place] if is_kept else self.in_flight.pop(place)
        self.take(batch)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))

    @precondition(lambda self: self.is_fetching and self.answer is None)
    @rule()
    def the_worker_answers(self) -> None:
        self.answer = self.worker.snapshot()

    @precondition(lambda self: self.answer is not None)
    @rule()
    def the_snapshot_arrives(self) -> None:
        assert self.answer is not None
        snapshot, self.answer = self.answer, None
        self.is_fetching = self.fence.on_snapshot(snapshot)

    @precondition(lambda self: self.is_fetching)
    @rule()
    def the_fetch_fails(self) -> None:
        self.answer = None
        self.is_fetching = False
        self.fence.on_fetch_failed()

    @rule()
    def the_worker_restarts(self) -> None:
        """The registry tells of the new life, later than the first batches of it may arrive; those of the old one are still in flight."""
        self.worker = Worker(self.worker.epoch + 1)
        self.history = {0: set()}
        early = self.publish_batch([BlocksStored([99])])
        self.take(early)
        self.fence = StreamFence("w", self.worker.epoch, self.mirror)
        self.mirror.held, self.mirror.step = set(), -1
        self.answer, self.is_fetching = None, False

    @invariant()
    def a_synced_mirror_holds_what_the_worker_held_at_that_point(self) -> None:
        if self.fence.is_synced:
            assert self.mirror.held == self.history[self.fence._sequence]

    def teardown(self) -> None:
        """After the next heartbeat that arrives, and the snapshot that it may lead to, the mirror shows the truth."""
        if self.is_fetching:
            self.is_fetching = self.fence.on_snapshot(self.worker.snapshot())
        self.take(self.publish_batch([]))
        for _ in range(2):
            if self.is_fetching:
                self.is_fetching = self.fence.on_snapshot(self.worker.snapshot())
        assert not self.is_fetching
        assert self.fence.is_synced
        assert self.mirror.held == self.worker.held
        assert self.mirror.step == self.worker.sequence


TestLossyNetwork = LossyNetwork.TestCase
TestLossyNetwork.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(events, min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_an_undisturbed_stream_needs_one_snapshot(batches: list[list[KvEvent]]) -> None:
    worker, mirror = Worker(1), Mirror()
    fence = StreamFence("w", 1, mirror)
    for batch_events in batches:
        if fence.on_batch(worker.publish(batch_events)):
            assert not fence.on_snapshot(worker.snapshot())
        assert mirror.held == worker.held
    assert mirror.snapshot_count == 1


def test_a_snapshot_of_another_life_is_not_used() -> None:
    mirror = Mirror()
    fence = StreamFence("w", 1, mirror)
    assert fence.on_batch(Worker(1).publish([]))
    assert not fence.on_snapshot(Worker(2).snapshot())
    assert not fence.is_synced
    assert mirror.snapshot_count == 0
    assert fence.on_batch(Worker(1).publish([]))  # asked again


def test_a_listener_that_cannot_fetch_keeps_a_bounded_number_of_batches() -> None:
    worker, mirror = Worker(1), Mirror()
    fence = StreamFence("w", 1, mirror)
    early = worker.snapshot()
    fence.on_batch(worker.publish([BlocksStored([0])]))
    for number in range(10_000):
        fence.on_batch(worker.publish([BlocksStored([number])]))
    assert len(fence._buffer) < 5_000
    assert fence.on_snapshot(early)  # too old for what is left in the buffer
    assert not fence.on_snapshot(worker.snapshot())
    assert mirror.held == worker.held
