"""Pulls offered blocks into the engine's cache beside its steps: a prompt's, part by part, while it is still being computed elsewhere.

    PullAhead ─► parts ─┐
    PullAhead ─► parts ─┼─► one task for each request: reserve ─ read in a thread ─ settle ─ …
    Submit ─► offer ────┤                                        └─► `complete` or `pull_held` returns, and the engine takes the request
           └► holder ───┘ asked where it has the prefix cached

All of it is for speed only. Whatever does not arrive is told once more by the offer, which keeps its blocks; what does not arrive even
then, the engine computes. A request that never comes leaves nothing behind but cached blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from polyphase.core.errors import TransferError, WorkerLost
from polyphase.core.hashing import namespace_of
from polyphase.engines.interface import BlockSource, KvExporter, KvImporter, PrefixImport, Room
from polyphase.observe import request_context
from polyphase.transfer import Verdict
from polyphase.wire.kv import KvOffer, KvPart
from polyphase.wire.requests import KvHolder, PullAhead, Submit
from polyphase.worker.holders import Holders
from polyphase.worker.patience import Patience
from polyphase.worker.sources import OfferSources

log = logging.getLogger(__name__)

THREADS = 4  # reads at a time; a peer that does not answer holds one of them until the read's deadline
MAX_STREAMS = 512  # then the least recently used is forgotten
IDLE_S = 60.0  # without news of it, a request is not believed to come any more
ROOM_BYTES = 32 << 20  # read at a time
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
    arrived_count: int = 0
    on_arrival: Callable[[], None] = lambda: None

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
        self._room_count = max(1, ROOM_BYTES // self._layout.block_bytes)
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

    async def pull_held(self, request: Submit, holder: KvHolder, holders: Holders) -> None:
        """Pull what the holder has cached of the request's tokens and is not here, for as long as that is faster than computing it.

        Whatever fails is logged, and costs no more than that time.
        Cancel: reads under way go on to their end.
        """
        if holders.is_silent(holder):
            return
        size = self._layout.block_size
        stream = self._open(request.request_id, namespace_of(request.cache_salt, request.lora))
        stream.extend(request.token_ids[: (len(request.token_ids) - 1) // size * size])
        first, keys = stream.target.missing()
        if not keys:
            return
        patience = Patience.with_holder(holder, first, self._layout)
        loop, began_s = asyncio.get_running_loop(), time.monotonic()
        loop_began_s = loop.time()
        try:
            part = await holders.find(holder, first, keys, patience.first_s)
            if not part.block_ids:
                raise TransferError(f"worker {holder.worker_id} does not have the prefix any more")
            self._check(part, first, len(keys))
            self._enqueue(stream, _Blocks(first, part.block_ids, part.generations, part))
            assert stream.task is not None
            async with asyncio.timeout_at(loop_began_s + patience.until_s(0)) as limit:
                stream.on_arrival = lambda: limit.reschedule(loop_began_s + patience.until_s(stream.arrived_count))
                await asyncio.shield(stream.task)
        except (TimeoutError, WorkerLost, TransferError) as error:
            if isinstance(error, TimeoutError) and not stream.arrived_count:
                holders.note_silence(holder)
            cause = str(error) or "they did not come faster than they are computed"
            with request_context(request.request_id):
                log.info("blocks that worker %s is said to have are computed here: %s", holder.worker_id, cause)
        finally:
            stream.on_arrival = lambda: None
            stream.target.note_wait((time.monotonic() - began_s) * 1e3)

    def _check(self, part: KvPart, first_block: int, most: int) -> None:
        """Raises: TransferError if these are not blocks as they were asked for."""
        region = part.agent.region(part.region_id)
        is_sound = part.first_block == first_block and len(part.block_ids) == len(part.generations) <= most
        if region is None or region.layout != self._layout or not is_sound:
            raise TransferError("what it tells of does not fit what was asked for")

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
        stream = self._streams[request_id] = _Stream(request_id, target, namespace, used_s=time.monotonic())
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
        while (room := stream.target.reserve(blocks.first_block, min(end, stream.target.missing()[0] + self._room_count))) is not None:
            try:
                source = source or await self._source_of(blocks)
            except BaseException:
                stream.target.settle(room, 0)
                raise
            good_count = await self._fill(stream.target, room, blocks, source)
            stream.arrived_count += good_count
            stream.on_arrival()
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
