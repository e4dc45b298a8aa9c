"""What the world is told of the cache: stored and removed sequence hashes, in the order in which they happened.

Two blocks may carry one 64-bit hash (a collision: their content keys differ). The hash is announced with its first holder and withdrawn
with its last, so that a listener who believes the events never misses a prefix that is there.
"""

from __future__ import annotations

from collections.abc import Iterable

from polyphase.core.ids import SequenceHash
from polyphase.wire.events import BlocksRemoved, BlocksStored, KvEvent


class EventJournal:
    """Collects changes until they are taken."""

    def __init__(self) -> None:
        self._holders: dict[SequenceHash, int] = {}
        self._pending: list[tuple[bool, list[int]]] = []  # (stored?, hashes): runs of one kind

    def stored(self, hashes: Iterable[SequenceHash]) -> None:
        """Blocks with these hashes have been named."""
        all_holders, fresh = self._holders, list[int]()
        for sequence_hash in hashes:
            holders = all_holders.get(sequence_hash, 0)
            all_holders[sequence_hash] = holders + 1
            if holders == 0:
                fresh.append(sequence_hash)
        self._note(True, fresh)

    def removed(self, hashes: Iterable[SequenceHash]) -> None:
        """Blocks with these hashes have lost their names."""
        all_holders, gone = self._holders, list[int]()
        for sequence_hash in hashes:
            holders = all_holders.pop(sequence_hash)
            if holders > 1:
                all_holders[sequence_hash] = holders - 1
            else:
                gone.append(sequence_hash)
        self._note(False, gone)

    @property
    def has_pending(self) -> bool:
        return bool(self._pending)

    def take(self) -> list[KvEvent]:
        """The events since the last call, oldest first."""
        events: list[KvEvent] = [BlocksStored(hashes) if is_stored else BlocksRemoved(hashes) for is_stored, hashes in self._pending]
        self._pending = []
        return events

    def held(self) -> set[SequenceHash]:
        """All hashes that are cached now, the pending events included."""
        return set(self._holders)

    def _note(self, is_stored: bool, hashes: list[int]) -> None:
        if not hashes:
            return
        if self._pending and self._pending[-1][0] is is_stored:
            self._pending[-1][1].extend(hashes)
        else:
            self._pending.append((is_stored, hashes))
