"""TensorRT-LLM's KV events: `POST /kv_cache_events` takes them out of a queue, so whoever asks is the only one who hears of them.

    created   the pools, once
    stored    blocks of a chain, behind a parent; each with its tokens
    removed   block hashes
    updated   a block went to another tier, or has another priority

Events have running numbers and there is no replay: after a gap, all is forgotten and learnt anew. Each attention window has pools of its
own; only the widest holds whole prefixes. Source: `KVCacheEventSerializer` in TensorRT-LLM's `_utils.py`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
import msgspec

from polyphase.core.errors import EngineFailed, WireError
from polyphase.engines.served.dialect import Sink
from polyphase.engines.served.kv_translation import Batch, Translator
from polyphase.wire.events import KvEvent, Tier

log = logging.getLogger(__name__)

PATH = "/kv_cache_events"
PAUSE_S = 0.05  # between questions; an empty queue is waited for at the server, up to two seconds
TIMEOUT_S = 10.0
MAX_UNREACHABLE = 20  # in a row
_TIERS = (Tier.DEVICE, Tier.HOST)  # by cache level
_MEDIA = ("GPU", "CPU")


class _Event(msgspec.Struct):
    event_id: int
    data: dict[str, Any]
    window_size: int = 0
    attention_dp_rank: int | None = None


class EventReader:
    """From the queue's contents to our events, in order. Owner of what one server holds."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._decoder = msgspec.json.Decoder(list[_Event])
        self._translator = Translator(block_size)
        self._next: int | None = None
        self._widest = 0
        self._has_ranks = False
        self.gap_count = 0

    def read(self, page: bytes) -> list[KvEvent]:
        """Raises: WireError; then nothing of the page was taken."""
        try:
            events = self._decoder.decode(page)
        except msgspec.DecodeError as error:
            raise WireError(f"TensorRT-LLM's KV events cannot be understood: {error}") from error
        found: list[KvEvent] = []
        for event in events:
            found += self._follow(event)
            found += self._take(event)
        return found

    def _follow(self, event: _Event) -> list[KvEvent]:
        """Forget all at a gap."""
        expected, self._next = self._next, event.event_id + 1
        if expected is None or event.event_id == expected:
            return []
        self.gap_count += 1
        log.warning("KV events %d to %d are lost; what the engine holds is learnt anew", expected, event.event_id - 1)
        return self._translator.clear()

    def _take(self, event: _Event) -> list[KvEvent]:
        if self._has_ranks or event.attention_dp_rank:
            if not self._has_ranks:
                self._has_ranks = True
                log.warning("TensorRT-LLM has data-parallel ranks behind one port: which of them holds what is of no use for routing")
                return self._translator.clear()
            return []
        if event.window_size > self._widest:
            forget = self._widest > 0
            self._widest = event.window_size
            if forget:
                return [*self._translator.clear(), *self._of_widest(event)]
        return self._of_widest(event) if event.window_size == self._widest else []

    def _of_widest(self, event: _Event) -> list[KvEvent]:
        data = event.data
        try:
            match data.get("type"):
                case "stored":
                    return self._stored(data)
                case "removed":
                    hashes = data["block_hashes"]
                    removed = [{"type": "BlockRemoved", "block_hashes": hashes, "medium": medium} for medium in _MEDIA]
                    return self._translator.translate(Batch(0.0, removed))
                case "updated" if isinstance(level := data.get("cache_level"), dict):
                    source, target = _TIERS[int(level["old_value"])], _TIERS[int(level["new_value"])]
                    return self._translator.move(data["block_hash"], source, target, 0)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise WireError(f"a KV event of TensorRT-LLM cannot be understood ({error!r}): {str(data)[:200]}") from error
        return []

    def _stored(self, data: dict[str, Any]) -> list[KvEvent]:
        """Partly filled blocks and those with other than plain tokens are left out, and what stands behind them with them."""
        found: list[dict[str, Any]] = []
        parent = data.get("parent_hash") or None  # 0, too: the first block of a prompt has none
        for block in data["blocks"]:
            tokens = block["tokens"]
            if len(tokens) != self._block_size or any(token.get("token_extra_id") for token in tokens):
                break
            found.append(
                {
                    "type": "BlockStored",
                    "block_hashes": [block["block_hash"]],
                    "parent_block_hash": parent,
                    "token_ids": [token["token_id"] for token in tokens],
                    "block_size": self._block_size,
                    "medium": _MEDIA[int(block.get("cache_level") or 0)],
                }
            )
            parent = block["block_hash"]
        return self._translator.translate(Batch(0.0, found))


class KvEventPoll:
    """Implements `Observer`. There may be one for each server, over all workers and hosts."""

    def __init__(self, block_size: int, pause_s: float = PAUSE_S) -> None:
        self.reader = EventReader(block_size)
        self._pause_s = pause_s

    async def watch(self, client: httpx.AsyncClient, sink: Sink) -> None:
        unreachable = 0
        while True:
            try:
                response = await client.post(PATH, timeout=TIMEOUT_S)
                if response.status_code == 200 and (events := self.reader.read(response.content)):
                    sink.note_events(events)
                unreachable = 0
            except httpx.ConnectError as error:
                unreachable += 1
                if unreachable >= MAX_UNREACHABLE:
                    raise EngineFailed(f"TensorRT-LLM at {client.base_url} cannot be reached any more: {error}") from None
            except WireError as error:
                log.warning("KV events are left out: %s", error.message)
            except httpx.HTTPError as error:
                log.debug("no KV events: %s", error)
            await asyncio.sleep(self._pause_s)
