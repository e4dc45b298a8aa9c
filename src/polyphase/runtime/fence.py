"""Decides, for one life of one worker, what of its event stream may be applied: nothing twice, nothing out of order, nothing missing.

                          begin                          last page
    nothing is known ──► pages are asked for, one by ──► whole up to a sequence number ◄─────┐
        ▲                one; batches are kept               │ gap: later batches are kept,  │ they come
        │                     ▲                              ▼ the missing ones asked for ───┘
        │ pages do not come   │        they are no longer kept,
        └─────────────────────┴─────── or the digest differs: the listener's state has drifted

A pure state machine: batches, pages and times in, effects on the sink out, and the answer what must be fetched now. One fetch at a time.
"""

from __future__ import annotations

import logging
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from polyphase.runtime.pace import SnapshotPace
from polyphase.wire.events import Digests, EventBatch, KvEvent, Load, SnapshotPage, Tier, TierDigest

log = logging.getLogger(__name__)

MAX_BUFFERED_BATCHES = 4096  # then the oldest go, which shows as a gap
MAX_PAGES = 10_000  # of one snapshot
MAX_FRUITLESS_SNAPSHOTS = 3  # in a row that left the digest different; then it is the digest that is wrong


class EventSink(Protocol):
    """Who wants to know what workers hold. Called on the loop; must not block."""

    def on_reset(self, worker_id: str, epoch: int) -> None:
        """Forget what this worker holds: a snapshot begins, whose parts `on_held` brings."""

    def on_held(self, worker_id: str, epoch: int, tier: Tier, hashes: Sequence[int]) -> None:
        """The worker holds these too. `hashes` is a list or an array of uint64."""

    def on_events(self, worker_id: str, epoch: int, events: list[KvEvent]) -> None: ...

    def on_load(self, worker_id: str, epoch: int, load: Load) -> None: ...

    def digests(self, worker_id: str, epoch: int) -> Digests | None:
        """Of what the worker holds according to all that came in so far. None: it is not followed so closely."""


@dataclass(frozen=True, slots=True)
class FetchPage:
    """A page of a snapshot is wanted."""

    cursor: str | None


@dataclass(frozen=True, slots=True)
class FetchBatches:
    """The batches behind this sequence number are wanted."""

    after: int


Fetch = FetchPage | FetchBatches


@dataclass(slots=True)
class StreamCounts:
    """What became of one life's stream here."""

    gaps: int = 0  # batches were missing after the stream had been whole
    drifts: int = 0  # the digest differed
    repairs: int = 0  # gaps closed with the missing batches
    snapshots: int = 0


@dataclass(frozen=True, slots=True)
class StreamView:
    """How one worker's stream does, for people."""

    is_synced: bool
    counts: StreamCounts


class StreamFence:
    """The state of one worker's stream at one listener. What takes something in returns what to fetch now, if anything."""

    def __init__(self, worker_id: str, epoch: int, sink: EventSink) -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self.counts = StreamCounts()
        self._sink = sink
        self._pace = SnapshotPace()
        self._sequence: int | None = None  # last applied; None: what the sink has is not the state after any batch
        self._exact_from = 0  # before, a snapshot shows parts of later batches
        self._first_page_sequence = 0
        self._page_count = 0
        self._last_load = 0
        self._buffer: dict[int, EventBatch] = {}  # by sequence: what cannot be applied yet
        self._fetch: Fetch | None = None
        self._must_reload = False
        self._fruitless_count = 0
        self._ignores_digests = False

    @property
    def is_synced(self) -> bool:
        """Whether the sink shows exactly what the worker held after the last batch that arrived here."""
        return self._sequence is not None and self._sequence >= self._exact_from and not self._buffer and not self._must_reload

    def begin(self, now_ns: int) -> Fetch | None:
        """The worker can be asked from now on."""
        return self._next_fetch(now_ns)

    def on_batch(self, batch: EventBatch, now_ns: int) -> Fetch | None:
        """Take a batch; those of another worker or epoch are ignored."""
        if batch.worker_id != self.worker_id or batch.epoch != self.epoch:
            return None
        if batch.sequence > self._last_load:
            self._last_load = batch.sequence
            self._sink.on_load(self.worker_id, self.epoch, batch.load)
        was_whole = self._sequence is not None and not self._buffer and not isinstance(self._fetch, FetchPage)
        self._keep(batch)
        self._catch_up()
        if was_whole and self._buffer:
            self.counts.gaps += 1
        return self._next_fetch(now_ns)

    def on_page(self, page: SnapshotPage, now_ns: int) -> Fetch | None:
        """Take a page of a snapshot; with the last one, the batches kept meanwhile are applied behind it."""
        asked = self._fetch
        if not isinstance(asked, FetchPage):
            return None
        if page.worker_id != self.worker_id or page.epoch != self.epoch:
            self.on_fetch_failed()  # a life that the registry has not told of yet
            return None
        if (fault := self._fault_of(page, asked)) is not None:
            log.warning("worker %s: its snapshot is of no use: %s", self.worker_id, fault)
            self.on_fetch_failed()
            return None
        if asked.cursor is None:
            self._sink.on_reset(self.worker_id, self.epoch)
            self._sequence = None
            self._first_page_sequence = page.sequence
            self._page_count = 0
        self._page_count += 1
        for tier, data in page.blocks.items():
            self._sink.on_held(self.worker_id, self.epoch, tier, unpacked(data))
        if page.device_hashes:
            self._sink.on_held(self.worker_id, self.epoch, Tier.DEVICE, page.device_hashes)
        if page.next_cursor is not None:
            self._fetch = FetchPage(page.next_cursor)
            return self._fetch
        self._fetch = None
        self._must_reload = False
        self._sequence, self._exact_from = self._first_page_sequence, page.sequence
        self.counts.snapshots += 1
        self._catch_up()
        return self._next_fetch(now_ns)

    def on_missed(self, batches: Iterable[EventBatch], now_ns: int) -> Fetch | None:
        """Take the answer to a question for missed batches. If it does not help, everything is fetched."""
        asked = self._fetch
        if not isinstance(asked, FetchBatches):
            return None
        self._fetch = None
        for batch in batches:
            if batch.worker_id == self.worker_id and batch.epoch == self.epoch:
                self._keep(batch)
        self._catch_up()
        if not self._buffer:
            self.counts.repairs += 1
        elif self._sequence == asked.after:
            self._must_reload = True
        return self._next_fetch(now_ns)

    def on_fetch_failed(self) -> None:
        """Nothing was to be had. A later batch asks again; for everything, because a worker may not know the other question."""
        if isinstance(self._fetch, FetchBatches):
            self._must_reload = True
        self._fetch = None
        self._catch_up()

    def _fault_of(self, page: SnapshotPage, asked: FetchPage) -> str | None:
        if any(len(data) % 8 for data in page.blocks.values()):
            return "blocks must be 8 bytes for each hash"
        if page.next_cursor is not None and (page.next_cursor == asked.cursor or self._page_count >= MAX_PAGES):
            return "it has no end"
        return None

    def _keep(self, batch: EventBatch) -> None:
        if self._sequence is None or batch.sequence > self._sequence:
            self._buffer[batch.sequence] = batch
            if len(self._buffer) > MAX_BUFFERED_BATCHES:
                del self._buffer[next(iter(self._buffer))]

    def _catch_up(self) -> None:
        """Apply what follows on what was applied. While a snapshot is read nothing is: it may be older than what would be applied."""
        if self._sequence is None or isinstance(self._fetch, FetchPage):
            return
        while (batch := self._buffer.pop(self._sequence + 1, None)) is not None:
            self._apply(batch)
        if self._buffer and min(self._buffer) <= self._sequence:
            self._buffer = {sequence: batch for sequence, batch in self._buffer.items() if sequence > self._sequence}

    def _apply(self, batch: EventBatch) -> None:
        self._sequence = batch.sequence
        if batch.events:
            self._sink.on_events(self.worker_id, self.epoch, batch.events)
        if batch.digests is not None and batch.sequence >= self._exact_from and not self._must_reload and not self._ignores_digests:
            self._compare(batch.digests)

    def _compare(self, told: Digests) -> None:
        believed = self._sink.digests(self.worker_id, self.epoch)
        if believed is None:
            return
        told = {tier: digest for tier, digest in told.items() if digest.block_count}
        if believed == told:
            self._fruitless_count = 0
            return
        self.counts.drifts += 1
        self._fruitless_count += 1
        if self._fruitless_count > MAX_FRUITLESS_SNAPSHOTS:
            self._ignores_digests = True
            log.error("worker %s: snapshots do not make its digests agree; they are not looked at in this life of it", self.worker_id)
            return
        self._must_reload = True
        log.warning(
            "worker %s: what is known of its blocks has drifted (%s); a snapshot will mend it", self.worker_id, _difference(told, believed)
        )

    def _next_fetch(self, now_ns: int) -> Fetch | None:
        if self._fetch is not None:
            return None
        if self._sequence is None or self._must_reload:
            if self._pace.try_begin(now_ns):
                self._fetch = FetchPage(None)
        elif self._buffer:
            self._fetch = FetchBatches(self._sequence)
        return self._fetch


def unpacked(data: bytes) -> array[int]:
    hashes = array("Q")
    hashes.frombytes(data)
    if sys.byteorder == "big":
        hashes.byteswap()
    return hashes


def _difference(told: Digests, believed: Digests) -> str:
    nothing = TierDigest(0, 0)
    pairs = [(tier, believed.get(tier, nothing), told.get(tier, nothing)) for tier in Tier]
    return "; ".join(
        f"{tier}: knows {ours.block_count} blocks, told {theirs.block_count}" for tier, ours, theirs in pairs if ours != theirs
    )
