"""Decides, for one life of one worker, what of its event stream may be applied: nothing twice, nothing out of order, nothing missing.

                      batch                         snapshot
    UNSYNCED ── buffered, snapshot wanted ──► FETCHING ───────────► SYNCED (sequence)
        ▲                                       │ failed              │ gap: the batch is buffered,
        └───────────────────────────────────────┘                     ▼ snapshot wanted
                                                                   FETCHING

A pure state machine: batches and snapshots in, effects on the sink out, and the answer whether a snapshot must be fetched now.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import Protocol

from polyphase.wire.events import EventBatch, KvEvent, Load
from polyphase.wire.requests import Snapshot

MAX_BUFFERED_BATCHES = 4096  # then the oldest go, which shows as a gap after the snapshot: one more snapshot is fetched


class EventSink(Protocol):
    """Who wants to know what workers hold. Called on the loop; must not block."""

    def on_snapshot(self, worker_id: str, epoch: int, hashes: list[int]) -> None:
        """Replace all that is known of this worker."""

    def on_events(self, worker_id: str, epoch: int, events: list[KvEvent]) -> None: ...

    def on_load(self, worker_id: str, epoch: int, load: Load) -> None: ...


class _State(enum.Enum):
    UNSYNCED = enum.auto()
    FETCHING = enum.auto()
    SYNCED = enum.auto()


class StreamFence:
    """The state of one worker's stream at one listener. Both methods that take something return whether to fetch a snapshot now."""

    def __init__(self, worker_id: str, epoch: int, sink: EventSink) -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self._sink = sink
        self._state = _State.UNSYNCED
        self._sequence = 0  # last applied
        self._load_sequence = 0
        self._buffer: deque[EventBatch] = deque(maxlen=MAX_BUFFERED_BATCHES)
        self.gap_count = 0  # how often the stream had to be mended after it had been whole

    @property
    def is_synced(self) -> bool:
        return self._state is _State.SYNCED

    def on_batch(self, batch: EventBatch) -> bool:
        """Take a batch; those of another worker or epoch are ignored."""
        if batch.worker_id != self.worker_id or batch.epoch != self.epoch:
            return False
        if batch.sequence > self._load_sequence:
            self._load_sequence = batch.sequence
            self._sink.on_load(self.worker_id, self.epoch, batch.load)
        if self._state is _State.SYNCED:
            if batch.sequence <= self._sequence:
                return False
            if batch.sequence == self._sequence + 1:
                self._apply(batch)
                return False
            self.gap_count += 1
        self._buffer.append(batch)
        return self._want_snapshot()

    def on_snapshot(self, snapshot: Snapshot) -> bool:
        """Take the answer to a fetch: replaces everything, then the buffered batches behind it are applied."""
        if self._state is not _State.FETCHING:
            return False
        self._state = _State.UNSYNCED
        if snapshot.worker_id != self.worker_id or snapshot.epoch != self.epoch:
            return False  # a life that the registry has not told of yet; asked again at the next batch
        self._sink.on_snapshot(self.worker_id, self.epoch, snapshot.device_hashes)
        self._sequence = snapshot.sequence
        buffered = sorted(self._buffer, key=lambda batch: batch.sequence)
        self._buffer.clear()
        self._state = _State.SYNCED
        for place, batch in enumerate(buffered):
            if batch.sequence <= self._sequence:
                continue
            if batch.sequence != self._sequence + 1:
                self._buffer.extend(buffered[place:])
                return self._want_snapshot()
            self._apply(batch)
        return False

    def on_fetch_failed(self) -> None:
        """No snapshot was to be had; the next batch asks again."""
        if self._state is _State.FETCHING:
            self._state = _State.UNSYNCED

    def _want_snapshot(self) -> bool:
        if self._state is _State.FETCHING:
            return False
        self._state = _State.FETCHING
        return True

    def _apply(self, batch: EventBatch) -> None:
        self._sequence = batch.sequence
        if batch.events:
            self._sink.on_events(self.worker_id, self.epoch, batch.events)
