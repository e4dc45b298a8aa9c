"""Both ends of the event stream around the code that serves, for tests that play the network between them.

The truth is kept apart: plain sets, changed beside the journal and the ledger that are tested.
"""

from __future__ import annotations

from collections.abc import Sequence

from polyphase.core.digest import digest_sum
from polyphase.core.ids import Epoch, SequenceHash, WorkerId
from polyphase.kv import EventJournal, Ledger
from polyphase.router import PrefixIndex, Router, RouterSettings
from polyphase.runtime.recent import RecentBatches
from polyphase.runtime.stream import BatchSource
from polyphase.wire.events import AllCleared, BlocksRemoved, BlocksStored, Digests, KvEvent, Load, Tier, TierDigest
from tests.unit.router.builders import facts

Held = dict[Tier, set[int]]


def nothing() -> Held:
    return {tier: set() for tier in Tier}


def apply(held: Held, events: Sequence[KvEvent]) -> None:
    for event in events:
        match event:
            case BlocksStored(sequence_hashes=hashes, tier=tier):
                held[tier].update(hashes)
            case BlocksRemoved(sequence_hashes=hashes, tier=tier):
                held[tier].difference_update(hashes)
            case AllCleared():
                for blocks in held.values():
                    blocks.clear()


class Worker:
    """One life of a worker: its truth, and what it publishes. Pages and what it remembers are small, so that few blocks need many."""

    def __init__(self, epoch: int, worker_id: str = "w", kept_batches: int = 4) -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self.held = nothing()
        self.source = BatchSource(worker_id, epoch, Ledger(segment_blocks=4, page_segments=1), RecentBatches(kept_batches))
        self._journal = EventJournal()

    @property
    def sequence(self) -> int:
        return self.source.sequence

    def publish(self, events: Sequence[KvEvent] = ()) -> bytes:
        """Device blocks go through the journal, as an engine's do; events that change nothing may be among the others."""
        apply(self.held, events)
        told: list[KvEvent] = []
        for event in events:
            if isinstance(event, BlocksStored) and event.tier is Tier.DEVICE:
                self._journal.stored(map(SequenceHash, set(event.sequence_hashes) - self._journal.held()))
            elif isinstance(event, BlocksRemoved) and event.tier is Tier.DEVICE:
                self._journal.removed(map(SequenceHash, set(event.sequence_hashes) & self._journal.held()))
            else:
                told += [*self._journal.take(), event]
                if isinstance(event, AllCleared):
                    self._journal = EventJournal()
        return self.source.next_batch([*told, *self._journal.take()], Load(step=self.sequence))


class Mirror:
    """An `EventSink` of plain sets that follows one worker. Can be made to drift."""

    def __init__(self) -> None:
        self.held = nothing()
        self.step = -1
        self.reset_count = 0

    def on_reset(self, worker_id: str, epoch: int) -> None:
        self.held = nothing()
        self.reset_count += 1

    def on_held(self, worker_id: str, epoch: int, tier: Tier, hashes: Sequence[int]) -> None:
        self.held[tier].update(hashes)

    def on_events(self, worker_id: str, epoch: int, events: list[KvEvent]) -> None:
        apply(self.held, events)

    def on_load(self, worker_id: str, epoch: int, load: Load) -> None:
        assert load.step >= self.step  # loads never go back within a life
        self.step = load.step

    def digests(self, worker_id: str, epoch: int) -> Digests | None:
        return {tier: TierDigest(len(blocks), digest_sum(blocks)) for tier, blocks in self.held.items() if blocks}


class RouterSink:
    """An `EventSink` over a router, as the frontend's fleet is one; loads are of no interest here."""

    def __init__(self, index: PrefixIndex) -> None:
        self.router = Router(RouterSettings(), index)

    def join(self, worker_id: str, epoch: int) -> None:
        self.router.upsert_worker(facts(worker_id, epoch=epoch))

    def on_reset(self, worker_id: str, epoch: int) -> None:
        self.router.replace_blocks(WorkerId(worker_id), Epoch(epoch), ())

    def on_held(self, worker_id: str, epoch: int, tier: Tier, hashes: Sequence[int]) -> None:
        self.router.add_blocks(WorkerId(worker_id), Epoch(epoch), hashes, tier)  # type: ignore[arg-type]

    def on_events(self, worker_id: str, epoch: int, events: list[KvEvent]) -> None:
        self.router.apply(WorkerId(worker_id), Epoch(epoch), events)

    def on_load(self, worker_id: str, epoch: int, load: Load) -> None:
        self.router.report_load(WorkerId(worker_id), Epoch(epoch), load)

    def digests(self, worker_id: str, epoch: int) -> Digests | None:
        return self.router.digests(WorkerId(worker_id), Epoch(epoch))
