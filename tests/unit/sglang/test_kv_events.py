"""SGLang's KV events, as recorded, in our words."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from polyphase.core.hashing import namespace_of, sequence_hashes
from polyphase.engines.served.kv_events import KvEventObserver
from polyphase.engines.served.kv_translation import Batch, Translator, decode_batch
from polyphase.engines.sglang.flags import EVENT_TOPIC
from polyphase.wire.events import AllCleared, BlocksRemoved, BlocksStored, KvEvent, Tier
from tests.unit.sglang.test_engine import RECORDING, UNTIL_CLEARED
from tests.unit.vllm.double import EventsDouble

PROMPT = list(range(100, 200))


def held_after(batches: list[Batch]) -> set[int]:
    translator, held = Translator(16), set[int]()
    for batch in batches:
        for event in translator.translate(batch):
            match event:
                case BlocksStored():
                    held |= set(event.sequence_hashes)
                case BlocksRemoved():
                    held -= set(event.sequence_hashes)
                case AllCleared():
                    held.clear()
    assert translator.unnamed_count == 0
    return held


def test_recorded_events_name_the_prefixes_that_were_asked_for() -> None:
    held = held_after([decode_batch(frames[-1]) for frames in RECORDING.batches[:UNTIL_CLEARED]])
    assert set(sequence_hashes(PROMPT, 16)) <= held
    assert set(sequence_hashes(PROMPT, 16, namespace_of("tenant-a"))) <= held, "a salt is part of the name"


def test_a_flush_forgets_everything() -> None:
    assert held_after([decode_batch(frames[-1]) for frames in RECORDING.batches[: UNTIL_CLEARED + 1]]) == set()


def stored(hashes: list[int], tokens: list[Any], parent: int | None = None, **fields: Any) -> dict[str, Any]:
    event = {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": tokens,
        "block_size": 4,
        "lora_id": None,
    }
    return {**event, **fields}


def translated(*events: dict[str, Any]) -> list[KvEvent]:
    return Translator(4).translate(Batch(1.0, list(events)))


def test_tiers_of_its_hierarchical_cache() -> None:
    names = [int(name) for name in sequence_hashes([1, 2, 3, 4], 4)]
    removed = {"type": "BlockRemoved", "block_hashes": [7], "medium": "GPU"}
    media = [("GPU", Tier.DEVICE), ("CPU_PINNED", Tier.HOST), ("DISK", Tier.DISK), ("EXTERNAL", Tier.OBJECT)]
    found = translated(*(stored([7], [1, 2, 3, 4], medium=medium) for medium, _ in media), removed)
    assert found == [*(BlocksStored(names, tier) for _, tier in media), BlocksRemoved(names, Tier.DEVICE)]


def test_equal_hashes_under_two_keys_are_held_until_both_are_gone() -> None:
    """Source: with `extra_key`, SGLang publishes the same hashes for KV that is not shared."""
    removed = {"type": "BlockRemoved", "block_hashes": [7], "medium": "GPU"}
    names = [int(name) for name in sequence_hashes([1, 2, 3, 4], 4)]
    twice = [stored([7], [1, 2, 3, 4], medium="GPU")] * 2
    assert translated(*twice, removed) == [BlocksStored(names, Tier.DEVICE)]
    assert translated(*twice, removed, removed) == [BlocksStored(names, Tier.DEVICE), BlocksRemoved(names, Tier.DEVICE)]


def test_adapters_have_names_of_their_own() -> None:
    (found,) = translated(stored([7], [1, 2, 3, 4], medium="GPU", lora_name="sql"))
    assert found == BlocksStored([int(name) for name in sequence_hashes([1, 2, 3, 4], 4, namespace_of(None, "sql"))], Tier.DEVICE)


def test_pairs_of_tokens_under_speculation() -> None:
    (found,) = translated(stored([7], [[1, 2], [2, 3], [3, 4], [4, 5]], medium="GPU"))
    assert found == BlocksStored([int(name) for name in sequence_hashes([1, 2, 3, 4], 4)], Tier.DEVICE)


class Heard:
    def __init__(self) -> None:
        self.events: list[KvEvent] = []

    def note_events(self, events: Any) -> None:
        self.events += events

    def note_gauges(self, gauges: Any) -> None:
        raise AssertionError("these are events")


async def test_what_was_before_is_asked_for(tmp_path: Path) -> None:
    """The first batch goes out when nobody can have subscribed."""
    async with EventsDouble(tmp_path, RECORDING.batches[:UNTIL_CLEARED]) as double:
        observer, heard = KvEventObserver(double.endpoint, double.replay_endpoint, EVENT_TOPIC, 16), Heard()
        task = asyncio.create_task(observer.watch(None, heard))  # type: ignore[arg-type]
        await double.subscribed()
        async with asyncio.timeout(30):
            while observer.order.next < UNTIL_CLEARED:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await double.publish(RECORDING.batches[UNTIL_CLEARED])
        async with asyncio.timeout(30):
            while not any(isinstance(event, AllCleared) for event in heard.events):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait({task})
    assert double.asked == [0]


def test_a_batch_of_an_older_version_is_arrays() -> None:
    """Source: before maps, with the fields in the same order."""
    old = [1.0, [["BlockStored", [7], None, [1, 2, 3, 4], 4, None, "GPU"], ["AllBlocksCleared"]], 0]
    batch = decode_batch(msgspec.msgpack.encode(old))
    assert [event["type"] for event in batch.events] == ["BlockStored", "AllBlocksCleared"]
    assert len(Translator(4).translate(batch)) == 2
