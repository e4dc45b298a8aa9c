"""Which worker holds which prefixes, by the plainest means that work: the truth that faster indexes are tested against.

    hash of block 0 ─► {decode-0, decode-1}
    hash of block 1 ─► {decode-0}            match([0, 1]) = {decode-0: 2, decode-1: 1}

A block counts only if all blocks before it are there too: a worker that evicted block 0 and still holds block 1 can reuse nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from polyphase.core.ids import SequenceHash, WorkerId


class NaivePrefixIndex:
    """Sets in both directions. Memory: about 0.3 kB per block and worker."""

    def __init__(self) -> None:
        self._holders: dict[SequenceHash, set[WorkerId]] = {}
        self._held: dict[WorkerId, set[SequenceHash]] = {}

    def store(self, worker_id: WorkerId, hashes: Iterable[SequenceHash]) -> None:
        held = self._held.setdefault(worker_id, set())
        for sequence_hash in hashes:
            held.add(sequence_hash)
            self._holders.setdefault(sequence_hash, set()).add(worker_id)

    def remove(self, worker_id: WorkerId, hashes: Iterable[SequenceHash]) -> None:
        """Hashes that this worker does not hold are ignored: a snapshot may already have left them out."""
        held = self._held.get(worker_id, set())
        for sequence_hash in hashes:
            if sequence_hash in held:
                held.remove(sequence_hash)
                self._forget_holder(sequence_hash, worker_id)

    def clear(self, worker_id: WorkerId) -> None:
        for sequence_hash in self._held.pop(worker_id, set()):
            self._forget_holder(sequence_hash, worker_id)

    def match(self, hashes: Sequence[SequenceHash]) -> Mapping[WorkerId, int]:
        """Cost: O(depth of the deepest match x workers that hold it)."""
        depths: dict[WorkerId, int] = {}
        leading: set[WorkerId] | None = None
        for position, sequence_hash in enumerate(hashes, start=1):
            holders = self._holders.get(sequence_hash)
            leading = holders if leading is None or holders is None else leading & holders
            if not leading:
                break
            for worker_id in leading:
                depths[worker_id] = position
        return depths

    def block_count(self, worker_id: WorkerId) -> int:
        return len(self._held.get(worker_id, ()))

    def _forget_holder(self, sequence_hash: SequenceHash, worker_id: WorkerId) -> None:
        holders = self._holders[sequence_hash]
        holders.remove(worker_id)
        if not holders:
            del self._holders[sequence_hash]
