"""KV events of a real vLLM in our words: both wire forms, salts, removal, gaps, lost history and new lives."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import zmq
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st

from polyphase.core.errors import WireError
from polyphase.core.hashing import namespace_of, sequence_hashes
from polyphase.engines.served.dialect import Gauges
from polyphase.engines.served.kv_events import KvEventObserver, connectable, meet, parse_frames
from polyphase.engines.served.kv_translation import Batch, Translator, decode_batch
from polyphase.testing.deployment import free_port
from polyphase.wire.events import AllCleared, BlocksRemoved, BlocksStored, KvEvent, Tier
from tests.unit.vllm.double import EventsDouble, Recording

RECORDING = Recording()
PROMPT = list(range(100, 200))
BLOCK = 32


def held_after(events: Sequence[KvEvent]) -> set[int]:
    held: set[int] = set()
    for event in events:
        match event:
            case BlocksStored():
                held |= set(event.sequence_hashes)
            case BlocksRemoved():
                held -= set(event.sequence_hashes)
            case AllCleared():
                held.clear()
    return held


def stored(hashes: list[Any], parent: Any, tokens: list[int], **more: Any) -> dict[str, Any]:
    base = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": tokens, "block_size": BLOCK}
    return {**base, "lora_id": None, "medium": "GPU", "lora_name": None, **more}


def removed(*hashes: Any, medium: str = "GPU") -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": medium}


def translate(translator: Translator, *events: dict[str, Any]) -> list[KvEvent]:
    return translator.translate(Batch(0.0, list(events)))


def as_old_form(payload: bytes) -> bytes:
    """What older versions send for the same: arrays, and no rank."""
    time_s, events, _ = msgspec.msgpack.decode(payload)
    return msgspec.msgpack.encode([time_s, [list(event.values()) for event in events]])


class TestRecorded:
    def test_blocks_have_the_names_that_routers_give_them(self) -> None:
        translator = Translator(BLOCK)
        events = [event for batch in RECORDING.batches[:-1] for event in translator.translate(parse_frames(batch)[1])]
        held = held_after(events[: events.index(AllCleared(), 1)])
        assert set(sequence_hashes(PROMPT, BLOCK)) <= held
        assert set(sequence_hashes(PROMPT, BLOCK, "tenant-a")) <= held, "a salt makes another name"

    def test_both_forms_say_the_same(self) -> None:
        new, old = Translator(BLOCK), Translator(BLOCK)
        for _, _, payload in RECORDING.batches:
            assert new.translate(decode_batch(payload)) == old.translate(decode_batch(as_old_form(payload)))

    def test_a_reset_clears_everything(self) -> None:
        translator = Translator(BLOCK)
        events = [event for batch in RECORDING.batches for event in translator.translate(parse_frames(batch)[1])]
        assert events.count(AllCleared()) == 3
        assert len(translator) == 3, "what the legs of hand-overs stored after the last one"


class TestTranslator:
    def test_children_find_their_parent_and_its_namespace(self) -> None:
        translator = Translator(BLOCK)
        first = translate(translator, stored([b"x" * 32], None, PROMPT[:32], extra_keys=[["salt"]]))
        second = translate(translator, stored([7, 8], b"x" * 32, PROMPT[32:96], extra_keys=[None, None]))
        names = sequence_hashes(PROMPT[:96], BLOCK, "salt")
        assert first + second == [BlocksStored([int(names[0])]), BlocksStored([int(names[1]), int(names[2])])]

    def test_an_adapter_is_part_of_the_name(self) -> None:
        event = stored([1], None, PROMPT[:32], lora_name="poet", extra_keys=[["poet", "salt"]])
        names = sequence_hashes(PROMPT[:32], BLOCK, namespace_of("salt", "poet"))
        assert translate(Translator(BLOCK), event) == [BlocksStored([int(names[0])])]

    def test_a_block_is_held_until_its_last_copy_goes(self) -> None:
        translator = Translator(BLOCK)
        assert translate(translator, stored([1], None, PROMPT[:32]), stored([1], None, PROMPT[:32]), removed(1)) == [
            BlocksStored([int(sequence_hashes(PROMPT[:32], BLOCK)[0])])
        ]
        assert translate(translator, removed(1)) == [BlocksRemoved([int(sequence_hashes(PROMPT[:32], BLOCK)[0])])]
        assert translate(translator, removed(1)) == []
        assert len(translator) == 0

    def test_tiers_are_apart(self) -> None:
        translator = Translator(BLOCK)
        events = translate(translator, stored([1], None, PROMPT[:32]), stored([1], None, PROMPT[:32], medium="CPU"), removed(1))
        assert [(type(event), event.tier) for event in events if not isinstance(event, AllCleared)] == [
            (BlocksStored, Tier.DEVICE),
            (BlocksStored, Tier.HOST),
            (BlocksRemoved, Tier.DEVICE),
        ]
        assert translate(translator, stored([2], 1, PROMPT[32:64])), "its parent is still known"

    def test_what_cannot_be_named_is_left_out_with_its_descendants(self) -> None:
        translator = Translator(BLOCK)
        assert not translate(translator, stored([2], 1, PROMPT[:32]), stored([3], 2, PROMPT[32:64]))
        assert not translate(translator, stored([4], None, PROMPT[:32], kv_cache_spec_kind="sliding_window"))
        assert not translate(translator, stored([5], None, PROMPT[:31]))
        media = stored([6, 7], None, PROMPT[:64], extra_keys=[None, [["image", 3]]])
        assert translate(translator, media) == [BlocksStored([int(sequence_hashes(PROMPT[:32], BLOCK)[0])])]
        assert translator.unnamed_count == 5

    @given(st.binary(max_size=60))
    def test_noise_is_a_wire_error(self, payload: bytes) -> None:
        try:
            Translator(BLOCK).translate(decode_batch(payload))
        except WireError:
            pass


class Heard:
    """Implements `Sink`."""

    def __init__(self) -> None:
        self.events: list[KvEvent] = []
        self.changed = asyncio.Event()

    def note_events(self, events: Sequence[KvEvent]) -> None:
        self.events += events
        self.changed.set()

    def note_gauges(self, gauges: Gauges) -> None: ...

    async def until(self, names: Sequence[int]) -> None:
        async with asyncio.timeout(30):
            while not set(names) <= held_after(self.events):
                self.changed.clear()
                await self.changed.wait()


def chain() -> list[tuple[bytes, ...]]:
    """Three batches, a block each."""
    return [batch_of(number, [stored([number], number - 1 if number else None, PROMPT[32 * number :][:32])]) for number in range(3)]


def batch_of(number: int, events: list[dict[str, Any]], time_s: float | None = None) -> tuple[bytes, ...]:
    payload = msgspec.msgpack.encode([100.0 + number if time_s is None else time_s, events, 0])
    return b"kv-events", number.to_bytes(8, "big"), payload


NAMES = [int(name) for name in sequence_hashes(PROMPT, BLOCK)]


@asynccontextmanager
async def listening(double: EventsDouble) -> Any:
    observer, heard = KvEventObserver(double.endpoint, double.replay_endpoint, "kv-events", BLOCK), Heard()
    async with httpx.AsyncClient() as client:
        task = asyncio.create_task(observer.watch(client, heard))
        try:
            await double.subscribed()
            yield observer, heard
        finally:
            task.cancel()
            await asyncio.wait({task})


async def test_what_happened_before_is_asked_for(tmp_path: Path) -> None:
    async with EventsDouble(tmp_path, chain()) as double, listening(double) as (_, heard):
        await heard.until(NAMES)
    assert double.asked == [0]


async def test_a_gap_is_closed(tmp_path: Path) -> None:
    batches = chain()
    async with EventsDouble(tmp_path, batches[:1]) as double, listening(double) as (observer, heard):
        await heard.until(NAMES[:1])
        double.batches = batches
        await double.publish(batches[2])
        await heard.until(NAMES)
        await double.publish(batches[1])  # late, and known
        assert observer.gap_count == 1
    assert double.asked == [0, 1]
    assert AllCleared() not in heard.events


async def test_what_is_kept_no_more_is_learnt_anew(tmp_path: Path) -> None:
    later = batch_of(3, [stored([9], None, PROMPT[:32], extra_keys=[["other"]])])
    async with EventsDouble(tmp_path, chain()[:1]) as double, listening(double) as (_, heard):
        await heard.until(NAMES[:1])
        double.batches, double.forgotten = [*chain(), later], 3
        await double.publish(later)
        await heard.until([int(sequence_hashes(PROMPT[:32], BLOCK, "other")[0])])
    assert held_after(heard.events).isdisjoint(NAMES)


async def test_an_engine_that_was_started_again_is_noticed(tmp_path: Path) -> None:
    again = batch_of(0, [stored([9], None, PROMPT[:32], extra_keys=[["other"]])], time_s=999.0)
    async with EventsDouble(tmp_path, chain()) as double, listening(double) as (_, heard):
        await heard.until(NAMES)
        await double.publish(again)
        await heard.until([int(sequence_hashes(PROMPT[:32], BLOCK, "other")[0])])
    assert held_after(heard.events).isdisjoint(NAMES)


@pytest.mark.parametrize(
    ("endpoint", "to"),
    [("tcp://*:5557", "tcp://10.0.0.7:5557"), ("tcp://0.0.0.0:1", "tcp://10.0.0.7:1"), ("ipc:///run/x", "ipc:///run/x")],
)
def test_where_to_connect(endpoint: str, to: str) -> None:
    assert connectable(endpoint, "10.0.0.7") == to


@pytest.mark.parametrize("is_bound_by_the_engine", [True, False])
async def test_events_come_whoever_binds(is_bound_by_the_engine: bool) -> None:
    """vLLM connects to `tcp://127.0.0.1:5557`, and binds `tcp://*:0`, of which it then tells address and port."""
    with zmq.asyncio.Context() as context, context.socket(zmq.PUB) as publisher, context.socket(zmq.SUB) as listener:
        publisher.linger = listener.linger = 0
        endpoint = f"tcp://127.0.0.1:{free_port()}"
        if is_bound_by_the_engine:
            publisher.bind(endpoint)
        else:
            publisher.connect(endpoint)
        listener.subscribe("")
        meet(listener, endpoint)
        async with asyncio.timeout(30):
            while not await listener.poll(50):
                await publisher.send(b"a batch")
            assert await listener.recv() == b"a batch"
