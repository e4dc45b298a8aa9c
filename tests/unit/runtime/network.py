"""A simulated fleet of publishers and listeners in virtual time: one seed, one outcome.

The network drops, duplicates, delays and so reorders event batches, and loses questions and answers. Workers and frontends restart,
blocks vanish from and appear in indexes behind everybody's back, and the registry tells of lives before or after their first batches.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from polyphase.core.ids import SequenceHash, WorkerId
from polyphase.router import PrefixIndex
from polyphase.runtime.fence import Fetch, FetchBatches, FetchPage, StreamFence
from polyphase.wire.events import AllCleared, BlocksRemoved, BlocksStored, EventBatch, KvEvent, MissedBatches, SnapshotPage, Tier
from tests.unit.runtime.world import RouterSink, Worker

MS = 1_000_000
HASH_COUNT = 40
ANSWER_TIMEOUT_NS = 2_000 * MS
QUIET_NS = 90_000 * MS  # heartbeats until every back-off is over

_batches = msgspec.msgpack.Decoder(EventBatch)
_answers = msgspec.msgpack.Decoder(SnapshotPage | MissedBatches)


@dataclass(frozen=True)
class Weather:
    """Chances of one message, and how long those that arrive take at most."""

    loses: float
    doubles: float
    delay_ms: int


CALM = Weather(0.0, 0.0, 3)


class Frontend:
    """A router's index behind fences; restarts with nothing."""

    def __init__(self, net: Network, make_index: Callable[[], PrefixIndex]) -> None:
        self._net = net
        self._make_index = make_index
        self.restart()

    def restart(self) -> None:
        self.sink = RouterSink(self._make_index())
        self.fences: dict[str, StreamFence] = {}
        for worker in self._net.workers.values():
            self._net.later(lambda worker_id=worker.worker_id: self.learn(worker_id))  # type: ignore[misc]

    def learn(self, worker_id: str) -> None:
        """The registry tells which life the worker is in."""
        epoch = self._net.workers[worker_id].epoch
        known = self.fences.get(worker_id)
        if known is None or known.epoch != epoch:
            self.sink.join(worker_id, epoch)
            fence = self.fences[worker_id] = StreamFence(worker_id, epoch, self.sink)
            self._net.all_fences.append(fence)
            self._fetch(fence, fence.begin(self._net.now_ns))

    def hear(self, data: bytes) -> None:
        batch = _batches.decode(data)
        fence = self.fences.get(batch.worker_id)
        if fence is not None:
            self._fetch(fence, fence.on_batch(batch, self._net.now_ns))

    def _fetch(self, fence: StreamFence, fetch: Fetch | None) -> None:
        if fetch is None:
            return
        is_open = True

        def settle(data: bytes | None) -> None:
            nonlocal is_open
            if not is_open or self.fences.get(fence.worker_id) is not fence:
                return
            is_open = False
            if data is None:
                fence.on_fetch_failed()
                return
            answer = _answers.decode(data)
            if isinstance(answer, SnapshotPage):
                self._fetch(fence, fence.on_page(answer, self._net.now_ns))
            else:
                self._fetch(fence, fence.on_missed([_batches.decode(one) for one in answer.batches], self._net.now_ns))

        self._net.ask(fence.worker_id, fetch, settle)
        self._net.at(ANSWER_TIMEOUT_NS, lambda: settle(None))


class Network:
    def __init__(self, seed: int, make_indexes: Sequence[Callable[[], PrefixIndex]], *, can_corrupt: bool = True) -> None:
        self._can_corrupt = can_corrupt
        self.all_fences: list[StreamFence] = []
        self.rng = random.Random(seed)
        self.now_ns = 0
        self.weather = CALM
        self._order = itertools.count()
        self._due: list[tuple[int, int, Callable[[], None]]] = []
        self._epochs = itertools.count(1)
        self.workers: dict[str, Worker] = {}
        self.frontends: list[Frontend] = []
        for number in range(3):
            self._start_worker(f"w{number}")
        self.frontends = [Frontend(self, make_index) for make_index in make_indexes]

    # Time

    def at(self, delay_ns: int, call: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now_ns + delay_ns, next(self._order), call))

    def later(self, call: Callable[[], None]) -> None:
        self.at(self.rng.randrange(1, self.weather.delay_ms + 1) * MS, call)

    def run_for(self, duration_ns: int) -> None:
        end_ns = self.now_ns + duration_ns
        while self._due and self._due[0][0] <= end_ns:
            self.now_ns, _, call = heapq.heappop(self._due)
            call()
        self.now_ns = end_ns

    # Messages

    def _carry(self, call: Callable[[], None]) -> None:
        if self.rng.random() >= self.weather.loses:
            self.later(call)
        if self.rng.random() < self.weather.doubles:
            self.later(call)

    def ask(self, worker_id: str, fetch: Fetch, settle: Callable[[bytes], None]) -> None:
        def answer() -> None:
            source = self.workers[worker_id].source  # whichever life is there
            match fetch:
                case FetchPage(cursor):
                    told: SnapshotPage | MissedBatches = source.page(cursor)
                case FetchBatches(after):
                    told = source.missed(after)
            data = msgspec.msgpack.encode(told)
            self._carry(lambda: settle(data))

        self._carry(answer)

    # Life

    def _start_worker(self, worker_id: str) -> None:
        worker = self.workers[worker_id] = Worker(next(self._epochs), worker_id, kept_batches=self.rng.choice([1, 3, 20]))
        if self.rng.random() < 0.5:
            self.publish(worker, self._some_events())  # before anybody was told of it
        for frontend in self.frontends:
            self.later(lambda frontend=frontend: frontend.learn(worker_id))  # type: ignore[misc]

    def publish(self, worker: Worker, events: Sequence[KvEvent]) -> None:
        data = worker.publish(events)
        for frontend in self.frontends:
            self._carry(lambda frontend=frontend: frontend.hear(data))  # type: ignore[misc]

    def _some_events(self) -> list[KvEvent]:
        rng, events = self.rng, []
        for _ in range(rng.randrange(4)):
            tier = rng.choice([Tier.DEVICE, Tier.DEVICE, Tier.DEVICE, Tier.HOST, Tier.DISK, Tier.OBJECT])
            start = rng.randrange(HASH_COUNT)
            hashes = [one % HASH_COUNT for one in range(start, start + rng.randrange(1, 12))]
            event: KvEvent = BlocksStored(hashes, tier) if rng.random() < 0.6 else BlocksRemoved(hashes, tier)
            events.append(AllCleared() if rng.random() < 0.03 else event)
        return events

    def corrupt(self) -> None:
        """Some index forgets or invents some block: what a bug, or a lost event that nobody noticed, would do."""
        index = self.rng.choice(self.frontends).sink.router.index
        worker_id = WorkerId(self.rng.choice(list(self.workers)))
        change = self.rng.choice([index.store, index.remove])
        change(worker_id, [SequenceHash(self.rng.randrange(HASH_COUNT))], self.rng.choice(list(Tier)))

    def storm(self, step_count: int) -> None:
        rng = self.rng
        for _ in range(step_count):
            self.weather = rng.choice([CALM, Weather(0.1, 0.2, 30), Weather(0.5, 0.1, 400), Weather(0.95, 0.0, 3000)])
            self.run_for(rng.choice([1, 5, 50, 1500]) * MS)
            worker = rng.choice(list(self.workers.values()))
            self.publish(worker, self._some_events())
            if rng.random() < 0.04:
                self._start_worker(worker.worker_id)
            if rng.random() < 0.03:
                rng.choice(self.frontends).restart()
            if rng.random() < 0.05 and self._can_corrupt:
                self.corrupt()

    def calm_down(self) -> None:
        """Nothing is lost any more; workers go on publishing, and say at least once a second that they are there."""
        self.weather = CALM
        end_ns = self.now_ns + QUIET_NS
        while self.now_ns < end_ns:
            self.run_for(1000 * MS)
            for worker in self.workers.values():
                self.publish(worker, self._some_events() if self.rng.random() < 0.3 else [])
        self.run_for(1000 * MS)

    # The checker: knows plain sets and what an index answers, nothing of how it came to that

    def assert_truth(self) -> None:
        for frontend in self.frontends:
            index = frontend.sink.router.index
            for worker_id, worker in self.workers.items():
                assert frontend.fences[worker_id].is_synced
                seen: set[int] = set()
                for tier in Tier:
                    seen |= worker.held[tier]
                    assert index.block_count(WorkerId(worker_id), tier) == len(worker.held[tier])
                    for one in range(HASH_COUNT):
                        assert index.match([SequenceHash(one)]).depth(WorkerId(worker_id), tier) == (one in seen)
