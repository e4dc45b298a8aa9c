"""Prefixes of other workers on their way into the cache, ahead of the requests that will want them.

    tokens   | cached here | arrived     | under way | not offered yet
    blocks     found         named, idle   reserved    none

What has arrived is an ordinary cached prefix: the request finds it when it is admitted, and until then it is evicted like any other, though
last of all. So an import holds references only to the few blocks that are being written just now, never waits for room while it holds
some, and can be forgotten at any time: imports cannot block each other, nor a running sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from polyphase.core.ids import BlockId, ContentKey
from polyphase.engines.batching.exports import BlockExports
from polyphase.engines.interface import Room
from polyphase.kv import PrefixCache, SequenceBlocks

MAX_ROOM_BLOCKS = 128  # that one import holds at a time


class PrefixImport:
    """Of one request to come. Implements `engines.interface.PrefixImport`. Owner: `close`, or the request's submission."""

    def __init__(self, imports: PrefixImports, request_id: str, blocks: SequenceBlocks, salt: str | None) -> None:
        self._imports = imports
        self.request_id = request_id
        self.blocks = blocks
        self.salt = salt
        self.token_ids: list[int] = []
        self.count = 0  # leading blocks that were here when looked for last
        self.pulled_count = 0
        self.waited_ms = 0.0

    def extend(self, token_ids: Sequence[int]) -> None:
        self.token_ids.extend(token_ids)
        self.blocks.chain.extend(self.token_ids)

    def missing(self) -> tuple[int, Sequence[ContentKey]]:
        self._look_again(len(self.blocks.chain.keys))
        return self.count, self.blocks.chain.keys[self.count :]

    def _look_again(self, end: int) -> None:
        keys, pool = self.blocks.chain.keys, self._imports.cache.pool
        while self.count < end and pool.holds(keys[self.count]):
            self.count += 1

    def reserve(self, first_block: int, end_block: int) -> Room | None:
        cache = self._imports.cache
        end = min(end_block, len(self.blocks.chain.keys))
        self._look_again(end)
        wanted = min(end - self.count, MAX_ROOM_BLOCKS)
        if self.count < first_block or wanted <= 0 or not self._imports.has_room(wanted):
            return None
        block_ids = cache.pool.allocate(wanted)
        self._imports.exports.before_writing(block_ids)
        return Room(self.count, block_ids)

    def settle(self, room: Room, good_count: int) -> None:
        cache, chain = self._imports.cache, self.blocks.chain
        good = slice(room.first_block, room.first_block + good_count)
        block_ids = [BlockId(block_id) for block_id in room.block_ids]
        if good_count:
            cache.pool.name_all(block_ids[:good_count], chain.keys[good], chain.hashes[good])
        cache.pool.release(block_ids)
        self.count = max(self.count, good.stop)
        self.pulled_count += good_count
        self._imports.note_arrival(self, good_count)
        # A prefix is of use from its beginning only, so its beginning must not be forgotten before what has just arrived.
        prefix = cache.pool.match(chain.keys[: good.stop])
        cache.pool.retain(prefix)
        cache.pool.release(prefix)

    def note_wait(self, duration_ms: float) -> None:
        self.waited_ms += duration_ms

    def close(self) -> None:
        self._imports.forget(self)


class PrefixImports:
    """All of one engine, by request. `on_arrival` is called after each change of the cache: there are events to be told."""

    def __init__(self, cache: PrefixCache, exports: BlockExports, spare_count: Callable[[], int]) -> None:
        self.cache = cache
        self.exports = exports
        self.on_arrival: Callable[[], None] = lambda: None
        self._spare_count = spare_count
        self._open: dict[str, PrefixImport] = {}
        self._arrived_count = 0  # blocks of all that are open

    def open(self, request_id: str, salt: str | None) -> PrefixImport:
        """One that was open for this request is closed."""
        if (earlier := self._open.get(request_id)) is not None:
            self.forget(earlier)
        found = self._open[request_id] = PrefixImport(self, request_id, self.cache.open([], salt), salt)
        return found

    def claim(self, request_id: str, token_ids: Sequence[int], salt: str | None) -> PrefixImport | None:
        """Close and return the import that was made for this request; None if there is none for these tokens."""
        found = self._open.get(request_id)
        if found is None:
            return None
        self.forget(found)
        known = found.token_ids
        return found if found.salt == salt and known == token_ids[: len(known)] else None

    def has_room(self, count: int) -> bool:
        """What arrived for others is not taken away again, and each running sequence may soon want another block."""
        return count + self._arrived_count + self._spare_count() <= self.cache.pool.available_count

    def note_arrival(self, found: PrefixImport, count: int) -> None:
        if self._open.get(found.request_id) is found:
            self._arrived_count += count
        self.on_arrival()

    def forget(self, found: PrefixImport) -> None:
        """Idempotent."""
        if self._open.get(found.request_id) is found:
            del self._open[found.request_id]
            self._arrived_count -= found.pulled_count
