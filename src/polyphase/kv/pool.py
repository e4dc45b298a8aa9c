"""The physical blocks of one worker: who refers to them, which of them are cached prefixes, which one is given away next.

    state        references   named   leaves when
    free         0            no      it is allocated
    used         ≥ 1          maybe   the last reference is released
    idle         0            yes     a prefix hit retains it, or it is evicted, the longest unused first

A block is *named* by the content key of its prefix once its tokens are all computed. Two sequences may compute the same block at the
same time: both keep their copy, the first is named, the second goes straight back to the free ones when it is released.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from polyphase.core.errors import KvError
from polyphase.core.ids import BlockId, ContentKey, SequenceHash
from polyphase.kv.journal import EventJournal


class BlockPool:
    """Owner: whoever allocates or retains holds one reference to each of these blocks and releases it exactly once."""

    def __init__(self, block_count: int) -> None:
        if block_count < 1:
            raise KvError(f"a block pool needs at least one block, not {block_count}")
        self.journal = EventJournal()
        self._references = [0] * block_count
        self._free = [BlockId(i) for i in reversed(range(block_count))]
        self._idle: OrderedDict[BlockId, None] = OrderedDict()
        self._names: dict[BlockId, tuple[ContentKey, SequenceHash]] = {}
        self._by_key: dict[ContentKey, BlockId] = {}

    @property
    def block_count(self) -> int:
        return len(self._references)

    @property
    def available_count(self) -> int:
        """Blocks that `allocate` can give: free ones and those it may evict."""
        return len(self._free) + len(self._idle)

    @property
    def idle_count(self) -> int:
        return len(self._idle)

    @property
    def used_count(self) -> int:
        return self.block_count - self.available_count

    def allocate(self, count: int) -> list[BlockId]:
        """Take `count` blocks, one reference each; evicts as needed.

        Raises: KvError if fewer are available; then nothing was taken.
        """
        if count > self.available_count:
            raise KvError(f"{count} blocks asked of a pool with {self.available_count} available of {self.block_count}")
        taken: list[BlockId] = []
        if count and self._free:
            taken = self._free[-count:]
            del self._free[-count:]
            taken.reverse()
        if len(taken) < count:
            evicted = [self._idle.popitem(last=False)[0] for _ in range(count - len(taken))]
            self._unname(evicted)
            taken += evicted
        references = self._references
        for block_id in taken:
            references[block_id] = 1
        return taken

    def retain(self, block_ids: Iterable[BlockId]) -> None:
        """Add a reference to blocks that are used or idle."""
        for block_id in block_ids:
            if self._references[block_id] == 0:
                if block_id not in self._idle:
                    raise KvError(f"block {block_id} is free: it holds nothing that could be retained")
                del self._idle[block_id]
            self._references[block_id] += 1

    def release(self, block_ids: Sequence[BlockId]) -> None:
        """Drop one reference to each block of a prefix, given from its first block to its last.

        Idle blocks are evicted in the order in which they became idle, and here the last one becomes idle first: a prefix is
        forgotten from its end, because without its beginning the rest could not be found.

        Raises: KvError if a block has no reference.
        """
        all_references, names, idle, free = self._references, self._names, self._idle, self._free
        for block_id in reversed(block_ids):
            references = all_references[block_id]
            if references == 0:
                raise KvError(f"block {block_id} is released more often than it was taken")
            all_references[block_id] = references - 1
            if references == 1:
                if block_id in names:
                    idle[block_id] = None
                else:
                    free.append(block_id)

    def name(self, block_id: BlockId, key: ContentKey, sequence_hash: SequenceHash) -> bool:
        """Make a fully computed block findable under `key`. Returns False if another block already has that name."""
        return self.name_all([block_id], [key], [sequence_hash]) == 1

    def name_all(self, block_ids: Sequence[int], keys: Sequence[ContentKey], hashes: Sequence[SequenceHash]) -> int:
        """As `name`, for the blocks of a prefix from its first to its last; returns how many got their names."""
        names, by_key, references = self._names, self._by_key, self._references
        named: list[SequenceHash] = []
        for place, key, sequence_hash in zip(block_ids, keys, hashes, strict=True):
            block_id = BlockId(place)
            if references[block_id] == 0:
                raise KvError(f"block {block_id} is named although nobody refers to it")
            if block_id in names:
                raise KvError(f"block {block_id} is named a second time")
            if key not in by_key:
                by_key[key] = block_id
                names[block_id] = (key, sequence_hash)
                named.append(sequence_hash)
        self.journal.stored(named)
        return len(named)

    def disown(self, block_ids: Iterable[BlockId]) -> list[BlockId]:
        """Take the names from those blocks that only the caller refers to, because what they hold is not to be trusted; returns these."""
        sole = [block_id for block_id in block_ids if self._references[block_id] == 1]
        self._unname([block_id for block_id in sole if block_id in self._names])
        return sole

    def match(self, keys: Iterable[ContentKey]) -> list[BlockId]:
        """Blocks of the longest cached prefix of `keys`. Takes no reference."""
        found: list[BlockId] = []
        for key in keys:
            block_id = self._by_key.get(key)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def holds(self, key: ContentKey) -> bool:
        """Whether a block of this name is cached."""
        return key in self._by_key

    def idle_among(self, block_ids: Iterable[BlockId]) -> int:
        """How many of these blocks would no longer be available once retained."""
        return sum(1 for block_id in block_ids if self._references[block_id] == 0)

    def check_invariants(self) -> None:
        """Raises: KvError if the books contradict themselves. Cost: linear in the pool; for tests."""
        free, idle = set(self._free), set(self._idle)
        unreferenced = {BlockId(i) for i, references in enumerate(self._references) if references == 0}
        checks = {
            "no reference count is negative": min(self._references) >= 0,
            "no block is free twice": len(free) == len(self._free),
            "free and idle blocks are the unreferenced ones": not free & idle and free | idle == unreferenced,
            "idle blocks are named, free ones are not": idle <= self._names.keys() and not free & self._names.keys(),
            "names and keys are each other's inverse": {b: k for b, (k, _) in self._names.items()}
            == {b: k for k, b in self._by_key.items()},
            "the journal holds what is named": {h for _, h in self._names.values()} == self.journal.held(),
        }
        broken = [rule for rule, holds in checks.items() if not holds]
        if broken:
            raise KvError("block pool is inconsistent; not true any more: " + "; ".join(broken))

    def _unname(self, block_ids: Iterable[BlockId]) -> None:
        gone: list[SequenceHash] = []
        for block_id in block_ids:
            key, sequence_hash = self._names.pop(block_id)
            del self._by_key[key]
            gone.append(sequence_hash)
        self.journal.removed(gone)
