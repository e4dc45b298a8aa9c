"""The event stream's messages as they go over the wire: what adapters and listeners of other versions rely on (`docs/events.md`).

A file holds the bytes in hexadecimal. What is in it stays: a field with a default may be added, and nothing else changes. To write new
ones after a change that was meant: `POLYPHASE_WRITE_GOLDEN=1 pytest tests/unit/wire`.
"""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

import msgspec
import pytest

from polyphase.runtime.stream import BatchSource
from polyphase.wire.events import (
    AllCleared,
    BlocksRemoved,
    BlocksStored,
    EventBatch,
    Load,
    MissedBatches,
    SnapshotPage,
    Tier,
    TierDigest,
)
from polyphase.wire.requests import Answer, FromWorker, Query, Question, ToWorker

GOLDEN = Path(__file__).parent / "golden"
BIG = 2**64 - 1
BATCH = EventBatch(
    "decode-0",
    1_700_000_000_000_000_000,
    7,
    [BlocksStored([1, BIG]), BlocksStored([2], Tier.HOST), BlocksRemoved([3], Tier.DISK), AllCleared()],
    Load(step=5, running_count=2),
    {Tier.DEVICE: TierDigest(2, 12), Tier.OBJECT: TierDigest(1, BIG)},
)
PAGE = SnapshotPage("decode-0", 9, 7, {Tier.DEVICE: bytes(range(16)), Tier.DISK: bytes(8)}, "2:5")
MESSAGES: dict[str, tuple[Any, Any]] = {
    "batch": (BATCH, EventBatch),
    "heartbeat": (EventBatch("w", 1, 8, [], Load(), {}), EventBatch),
    "query_first_page": (Query(4, Question.SNAPSHOT), ToWorker),
    "query_next_page": (Query(5, Question.SNAPSHOT, "2:5"), ToWorker),
    "query_batches": (Query(6, Question.BATCHES, after=7), ToWorker),
    "page": (Answer(5, PAGE), FromWorker),
    "missed": (Answer(6, MissedBatches("w", 1, [msgspec.Raw(msgspec.msgpack.encode(EventBatch("w", 1, 8, [], Load())))])), FromWorker),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_are_what_they_were(name: str):
    message, kind = MESSAGES[name]
    file = GOLDEN / f"{name}.hex"
    data = msgspec.msgpack.encode(message)
    if os.environ.get("POLYPHASE_WRITE_GOLDEN") == "1":
        file.write_text("\n".join(textwrap.wrap(data.hex(), 120)) + "\n")
    kept = bytes.fromhex(file.read_text())
    assert_extends(msgspec.msgpack.decode(data), msgspec.msgpack.decode(kept))
    again = msgspec.msgpack.decode(kept, type=kind)
    assert_extends(plain(again), msgspec.msgpack.decode(kept))
    assert plain(again) == msgspec.msgpack.decode(data) or name == "missed"  # which carries batches as they were


def assert_extends(now: Any, before: Any) -> None:
    """Maps may have new fields, behind the old ones; all else is as it was, in the same order."""
    assert type(now) is type(before)
    if isinstance(before, dict):
        assert list(now)[: len(before)] == list(before)
        for key, value in before.items():
            assert_extends(now[key], value)
    elif isinstance(before, list):
        assert len(now) == len(before)
        for new, old in zip(now, before, strict=True):
            assert_extends(new, old)
    else:
        assert now == before


def plain(message: Any) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message))


def test_the_fields_are_those_of_the_documentation():
    batch = plain(BATCH)
    assert list(batch) == ["worker_id", "epoch", "sequence", "events", "load", "digests"]
    assert batch["events"] == [
        {"type": "stored", "sequence_hashes": [1, BIG], "tier": "device"},
        {"type": "stored", "sequence_hashes": [2], "tier": "host"},
        {"type": "removed", "sequence_hashes": [3], "tier": "disk"},
        {"type": "cleared"},
    ]
    assert batch["digests"] == {"device": [2, 12], "object": [1, BIG]}
    assert plain(PAGE)["type"] == "snapshot"
    assert plain(PAGE)["blocks"] == {"device": bytes(range(16)), "disk": bytes(8)}
    assert plain(Query(5, Question.SNAPSHOT, "2:5")) == {"type": "query", "query_id": 5, "question": "snapshot", "cursor": "2:5"}
    assert plain(Query(6, Question.BATCHES, after=7)) == {"type": "query", "query_id": 6, "question": "batches", "after": 7}
    assert plain(Answer(6, MissedBatches("w", 1, [])))["body"] == {"type": "missed", "worker_id": "w", "epoch": 1, "batches": []}


def test_what_an_adapter_may_leave_out_has_its_default():
    small = {"worker_id": "w", "epoch": 1, "sequence": 1, "events": [{"type": "stored", "sequence_hashes": [5]}], "load": {}, "new": 1}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(small), type=EventBatch) == EventBatch("w", 1, 1, [BlocksStored([5])], Load())
    page = {"type": "snapshot", "worker_id": "w", "epoch": 1, "sequence": 1}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(page), type=SnapshotPage) == SnapshotPage("w", 1, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"worker_id": "w", "epoch": 1, "sequence": 1, "events": [], "load": {}, "digests": {"tape": [1, 2]}},
        {"worker_id": "w", "epoch": 1, "sequence": 1, "events": [{"type": "stored", "sequence_hashes": ["5"]}], "load": {}},
        {"worker_id": "w", "epoch": 1, "sequence": 1, "events": [{"type": "removed", "sequence_hashes": [-5]}], "load": {}},
        {"worker_id": "w", "epoch": 1, "events": [], "load": {}},
    ],
)
def test_what_is_wrong_is_not_decoded(wrong: dict[str, Any]):
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(wrong), type=EventBatch)


def test_a_publisher_sends_such_batches():
    source = BatchSource("w", 3)
    batch = msgspec.msgpack.decode(source.next_batch([BlocksStored([0, 1]), BlocksStored([1]), BlocksStored([9], Tier.HOST)], Load(step=1)))
    mix_of_0_and_1 = (0xE220A8397B1DCDAF + 0x910A2DEC89025CC1) % 2**64
    assert batch["events"] == [
        {"type": "stored", "sequence_hashes": [0, 1], "tier": "device"},
        {"type": "stored", "sequence_hashes": [9], "tier": "host"},
    ]
    assert batch["digests"]["device"] == [2, mix_of_0_and_1]
    assert (batch["sequence"], batch["epoch"]) == (1, 3)
