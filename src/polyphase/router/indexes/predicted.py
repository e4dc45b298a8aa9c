"""What workers probably hold, for engines that tell nothing: a prompt routed to a worker is believed to be cached there for a while.

    expect ─► believed for `lifetime_ns`, anew each time it is expected again ─► forgotten; at once beyond `capacity`

The time comes in as a value. What a worker does tell (`store`, `remove`, `clear`) is taken as expected or withdrawn now, so that the
index fits wherever another one does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from polyphase.core.ids import SequenceHash, WorkerId
from polyphase.core.native import is_native
from polyphase.router.indexes.naive import NaivePrefixIndex
from polyphase.router.indexes.native import native_index
from polyphase.router.types import Overlaps, PrefixIndex
from polyphase.wire.events import Tier

# Source: Dynamo's approximate mode believes a block for 120 s; a busy worker's cache turns over about as fast.
DEFAULT_LIFETIME_NS = 120 * 10**9
DEFAULT_CAPACITY = 1_000_000


@dataclass(frozen=True, slots=True)
class _Expectation:
    worker_id: WorkerId
    tier: Tier
    hashes: tuple[SequenceHash, ...]
    ends_ns: int


class PredictedPrefixIndex:
    """`capacity` bounds blocks times workers: what was expected longest ago goes first, and `forgotten` counts it."""

    def __init__(self, capacity: int = DEFAULT_CAPACITY, lifetime_ns: int = DEFAULT_LIFETIME_NS, index: PrefixIndex | None = None) -> None:
        """`index`: where beliefs are kept; one that is shared may hold what other workers tell of themselves."""
        if capacity < 1 or lifetime_ns < 1:
            raise ValueError(f"capacity {capacity} and lifetime {lifetime_ns} ns: both must be positive")
        self.capacity = capacity
        self.forgotten = 0
        self._lifetime_ns = lifetime_ns
        self._now_ns = 0
        own = NaivePrefixIndex if index is None and not is_native() else native_index
        self._index: PrefixIndex = own(capacity) if index is None else index
        self._queue: deque[_Expectation] = deque()  # soonest to end first
        self._ends_ns: dict[tuple[WorkerId, Tier], dict[SequenceHash, int]] = {}
        self._believed = 0
        self._queued = 0  # blocks in the queue; those expected several times count each time

    @property
    def size(self) -> int:
        """Blocks believed; one that several workers are believed to hold counts for each."""
        return self._believed

    @property
    def kind(self) -> str:
        return self._index.kind

    @property
    def heap_bytes(self) -> int:
        return self._index.heap_bytes

    def expect(self, worker_id: WorkerId, hashes: Iterable[SequenceHash], now_ns: int, tier: Tier = Tier.DEVICE) -> None:
        """A prompt with these blocks goes to this worker now."""
        self.expire(now_ns)
        leading = tuple(hashes)[: self.capacity]  # of a prompt that is longer than that, its beginning is of most use
        if not leading:
            return
        self._make_room(worker_id, tier, set(leading))
        expected = _Expectation(worker_id, tier, leading, self._now_ns + self._lifetime_ns)
        ends_ns = self._ends_ns.setdefault((worker_id, tier), {})
        self._believed -= len(ends_ns)
        ends_ns.update(dict.fromkeys(leading, expected.ends_ns))
        self._believed += len(ends_ns)
        self._queue.append(expected)
        self._queued += len(leading)
        self._index.store(worker_id, leading, tier)

    def expire(self, now_ns: int) -> None:
        """Forget what was not expected again for the lifetime. A time before the last one known counts as that."""
        self._now_ns = max(self._now_ns, now_ns)
        while self._queue and self._queue[0].ends_ns <= self._now_ns:
            self._end(self._queue.popleft())

    def store(self, worker_id: WorkerId, hashes: Iterable[SequenceHash], tier: Tier = Tier.DEVICE) -> None:
        self.expect(worker_id, hashes, self._now_ns, tier)

    def remove(self, worker_id: WorkerId, hashes: Iterable[SequenceHash], tier: Tier = Tier.DEVICE) -> None:
        ends_ns = self._ends_ns.get((worker_id, tier), {})
        gone = [sequence_hash for sequence_hash in hashes if ends_ns.pop(sequence_hash, None) is not None]
        self._believed -= len(gone)
        self._index.remove(worker_id, gone, tier)

    def clear(self, worker_id: WorkerId) -> None:
        for tier in Tier:
            self._believed -= len(self._ends_ns.pop((worker_id, tier), ()))
        self._index.clear(worker_id)

    def match(self, hashes: Sequence[SequenceHash]) -> Overlaps:
        return self._index.match(hashes)

    def block_count(self, worker_id: WorkerId, tier: Tier = Tier.DEVICE) -> int:
        return self._index.block_count(worker_id, tier)

    def digest(self, worker_id: WorkerId, tier: Tier = Tier.DEVICE) -> None:
        return None

    def _make_room(self, worker_id: WorkerId, tier: Tier, wanted: set[SequenceHash]) -> None:
        while self._queue:
            known = self._ends_ns.get((worker_id, tier), {})
            # The queue is bounded too: prompts that are expected over and over wait in it each time.
            if self._believed + len(wanted - known.keys()) <= self.capacity and self._queued + len(wanted) <= 4 * self.capacity:
                return
            before = self._believed
            self._end(self._queue.popleft())
            self.forgotten += before - self._believed

    def _end(self, expected: _Expectation) -> None:
        """Withdraw what was not expected again since."""
        self._queued -= len(expected.hashes)
        ends_ns = self._ends_ns.get((expected.worker_id, expected.tier), {})
        gone = {one for one in expected.hashes if ends_ns.get(one, expected.ends_ns + 1) <= expected.ends_ns}
        for one in gone:
            del ends_ns[one]
        self._believed -= len(gone)
        if not ends_ns:
            self._ends_ns.pop((expected.worker_id, expected.tier), None)
        self._index.remove(expected.worker_id, gone, expected.tier)
