"""Pulls offered blocks into the engine's cache beside its steps: a prompt's, part by part, while it is still being computed elsewhere.

    PullAhead ─► parts ─┐
    PullAhead ─► parts ─┼─► one task for each request: reserve ─ read in a thread ─ settle ─ …
    Submit ─► offer ────┘                                        └─► `complete` returns, and the engine takes the request

All of it is for speed only. Whatever does not arrive is told once more by the offer, which keeps its blocks; what does not arrive even
then, the engine computes. A request that never comes leaves nothing behind but cached blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from polyphase.core.errors import TransferError
from polyphase.core.hashing import namespace_of
from polyphase.engines.interface import BlockSource, KvExporter, KvImporter, PrefixImport, Room
from polyphase.observe import request_context
from polyphase.transfer import Verdict
from polyphase.wire.kv import KvOffer, KvPart
from polyphase.wire.requests import PullAhead, Submit
from polyphase.worker.sources import OfferSources

log = logging.getLogger(__name__)

THREADS = 4  # reads at a time; a peer that does not answer holds one of them until the read's deadline
MAX_STREAMS = 512  # then the least recently used is forgotten
IDLE_S = 60.0  # without news of it, a request is not believed to come any more
PATIENCE_S, SLOWEST_BYTES_PER_S = 2.0, 100e6  # for an offer; whatever comes later than that, computing was faster


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Of a prefix, number `first_block` and following, as their owner told of them."""

    first_block: int
    block_ids: Sequence[int]
    generations: Sequence[int]
    origin: KvPart | BlockSource


@dataclass(slots=True)
class _Stream:
    """What one request's prefix does. Its task runs while there are parts."""

    request_id: str
    target: PrefixImport
    namespace: str | None
    parts: deque[_Blocks] = field(default_factory=deque)
    token_ids: list[int] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    used_s: float = 0.0

    def extend(self, token_ids: list[int]) -> None:
        self.token_ids += token_ids
        self.target.extend(token_ids)


class PullsAhead:
    """Of one worker, on its event loop. `engine` must be both exporter and importer: its memory is written here."""

    def __init__(self, exporter: KvExporter, importer: KvImporter, sources: OfferSources) -> None:
        self._importer = importer
        self._sources = sources
        self._memory = exporter.kv_memory
        self._layout = exporter.kv_layout
        self._streams: OrderedDict[str, _Stream] = OrderedDict()  # least recently used first
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="kv-pull")

    def add(self, message: PullAhead) -> None:
        """A part of a request that may come. What does not join on to the parts before is of no use, and ignored."""
        part, block_size = message.part, self._layout.block_size
        namespace = namespace_of(message.cache_salt, message.lora)
        stream = self._streams.get(message.request_id)
        if stream is None:
            stream = self._open(message.request_id, namespace)
        region = part.agent.region(part.region_id)
        is_sound = len(part.block_ids) == len(part.generations) and len(message.token_ids) == len(part.block_ids) * block_size
        is_next = len(stream.token_ids) == part.first_block * block_size and stream.namespace == namespace
        if region is None or region.layout != self._layout or not is_sound or not is_next:
            with request_context(message.request_id):
                log.info("blocks %d and following of its prompt are not pulled ahead: they do not fit what is here", part.first_block)
            return
        stream.extend(message.token_ids)
        self._enqueue(stream, _Blocks(part.first_block, part.block_ids, part.generations, part))

    async def complete(self, request: Submit, offer: KvOffer, source: BlockSource) -> bool:
        """Wait until the full blocks of the offer are here, as far as there is room for them.

        Returns: False if some could not be read: the offer is not worth a second try.
        Cancel: reads under way go on to their end and are of use to the next request with this prefix.
        """
        token_ids, block_size = request.token_ids, self._layout.block_size
        namespace = namespace_of(request.cache_salt, request.lora)
        stream = self._streams.get(request.request_id)
        if stream is None or stream.namespace != namespace or stream.token_ids != token_ids[: len(stream.token_ids)]:
            stream = self._open(request.request_id, namespace)
        if offer.layout != self._layout or len(offer.block_ids) != len(offer.generations):
            return True  # the engine judges
        full_count = min(offer.token_count, len(token_ids) - 1) // block_size
        full_count = min(full_count, len(offer.block_ids))
        stream.extend(token_ids[len(stream.token_ids) : full_count * block_size])
        last = _Blocks(0, offer.block_ids[:full_count], offer.generations[:full_count], source)
        self._enqueue(stream, last)
        assert stream.task is not None
        began_s = time.monotonic()
        patience_s = PATIENCE_S + full_count * self._layout.block_bytes / SLOWEST_BYTES_PER_S
        try:
            async with asyncio.timeout(patience_s):
                await asyncio.shield(stream.task)
        except TimeoutError:
            with request_context(request.request_id):
                log.warning("its offered blocks were not here within %.1f s and are computed here", patience_s)
            return False
        except TransferError as error:
            with request_context(request.request_id):
                log.warning("what is missing of its offered blocks is computed here: %s", error.message)
            return False
        finally:
            stream.target.note_wait((time.monotonic() - began_s) * 1e3)
        return True

    def forget(self, request_id: str) -> None:
        """It is with the engine, or will not come. Unknown ids are ignored."""
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.target.close()
            if stream.task is not None:
                stream.task.cancel()

    def forget_idle(self) -> None:
        """Called now and then."""
        oldest_s = time.monotonic() - IDLE_S
        for request_id in [request_id for request_id, stream in self._streams.items() if stream.used_s < oldest_s]:
            self.forget(request_id)

    def close(self) -> None:
        """After the sources, whose end ends the reads."""
        for request_id in list(self._streams):
            self.forget(request_id)
        self._threads.shutdown()

    def _open(self, request_id: str, namespace: str | None) -> _Stream:
        self.forget(request_id)
        if len(self._streams) >= MAX_STREAMS:
            self.forget(next(iter(self._streams)))
        target = self._importer.open_import(request_id, namespace)
        stream = self._streams[request_id] = _Stream(request_id, target, namespace)
        return stream

    def _enqueue(self, stream: _Stream, blocks: _Blocks) -> None:
        stream.used_s = time.monotonic()
        self._streams.move_to_end(stream.request_id)
        stream.parts.append(blocks)
        if stream.task is None or stream.task.done():
            stream.task = asyncio.create_task(self._pull(stream), name=f"pull-{stream.request_id}")
            stream.task.add_done_callback(lambda done: done.cancelled() or done.exception())  # only `complete` wants to know

    async def _pull(self, stream: _Stream) -> None:
        """Raises: TransferError if the last part failed; parts before it are mended by the ones after."""
        while stream.parts:
            blocks = stream.parts.popleft()
            try:
                await self._pull_blocks(stream, blocks)
            except TransferError as error:
                if not stream.parts:
                    raise
                log.info("request %s: %s", stream.request_id, error.message)

    async def _pull_blocks(self, stream: _Stream, blocks: _Blocks) -> None:
        end = blocks.first_block + len(blocks.block_ids)
        source: BlockSource | None = None
        while (room := stream.target.reserve(blocks.first_block, end)) is not None:
            try:
                source = source or await self._source_of(blocks)
            except BaseException:
                stream.target.settle(room, 0)
                raise
            good_count = await self._fill(stream.target, room, blocks, source)
            if good_count < len(room.block_ids):
                raise TransferError(f"block {room.first_block + good_count} of the prompt did not arrive well")

    async def _source_of(self, blocks: _Blocks) -> BlockSource:
        origin = blocks.origin
        return await self._sources.meet(origin.agent, origin.region_id) if isinstance(origin, KvPart) else origin

    async def _fill(self, target: PrefixImport, room: Room, blocks: _Blocks, source: BlockSource) -> int:
        """Returns: how many blocks of the room are good. Cancel: the room is settled when the read has ended."""
        first = room.first_block - blocks.first_block
        part = slice(first, first + len(room.block_ids))

        def read() -> int:
            verdicts = b""
            # No more than a part of this prompt is lost by whatever a source may raise.
            with contextlib.suppress(TransferError, OSError, ValueError, BufferError):
                verdicts = source.read_blocks(blocks.block_ids[part], blocks.generations[part], self._memory, room.block_ids)
            return len(verdicts) - len(verdicts.lstrip(bytes([Verdict.DONE])))

        reading = asyncio.get_running_loop().run_in_executor(self._threads, read)
        reading.add_done_callback(lambda done: target.settle(room, done.result()))
        return await asyncio.shield(reading)
