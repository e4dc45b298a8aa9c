"""What the world is told of the cache: stored and removed sequence hashes, in the order in which they happened.

Two blocks may carry one 64-bit hash (a collision: their content keys differ). The hash is announced with its first holder and withdrawn
with its last, so that a listener who believes the events never misses a prefix that is there.
"""

from __future__ import annotations

from polyphase.core.ids import SequenceHash
from polyphase.wire.events import BlocksRemoved, BlocksStored, KvEvent


class EventJournal:
    """Collects changes until they are taken."""

    def __init__(self) -> None:
        self._holders: dict[SequenceHash, int] = {}
        self._pending: list[tuple[bool, list[int]]] = []  # (stored?, hashes): runs of one kind

    def stored(self, sequence_hash: SequenceHash) -> None:
        holders = self._holders.get(sequence_hash, 0)
        self._holders[sequence_hash] = holders + 1
        if holders == 0:
            self._note(True, sequence_hash)

    def removed(self, sequence_hash: SequenceHash) -> None:
        holders = self._holders[sequence_hash]
        if holders > 1:
            self._holders[sequence_hash] = holders - 1
        else:
            del self._holders[sequence_hash]
            self._note(False, sequence_hash)

    def take(self) -> list[KvEvent]:
        """The events since the last call, oldest first."""
        events: list[KvEvent] = [BlocksStored(hashes) if is_stored else BlocksRemoved(hashes) for is_stored, hashes in self._pending]
        self._pending = []
        return events

    def held(self) -> set[SequenceHash]:
        """All hashes that are cached now, the pending events included."""
        return set(self._holders)

    def _note(self, is_stored: bool, sequence_hash: SequenceHash) -> None:
        if self._pending and self._pending[-1][0] is is_stored:
            self._pending[-1][1].append(sequence_hash)
        else:
            self._pending.append((is_stored, [sequence_hash]))
