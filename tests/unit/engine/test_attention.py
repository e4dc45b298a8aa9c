"""The packed attention against the plain one, on random ragged batches."""

from __future__ import annotations

import random
from array import array

import pytest
import torch

from polyphase.engines.torch.attention import PackedAttention, PlainAttention
from polyphase.engines.torch.batch import BatchPacker, PackedRow
from polyphase.engines.torch.storage import DeviceStorage
from polyphase.wire.kv import KvLayout

LAYERS, BLOCK_COUNT = 3, 200


def storage_of(block_size: int, kv_heads: int, head_dim: int) -> DeviceStorage:
    block_bytes = LAYERS * 2 * block_size * kv_heads * head_dim * 4
    layout = KvLayout("float32", LAYERS, kv_heads, head_dim, block_size, block_bytes, "test")
    storage = DeviceStorage(layout, BLOCK_COUNT, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    storage.pages.copy_(torch.randn(storage.pages.shape, generator=generator))
    return storage


def random_rows(rng: random.Random, block_size: int) -> list[PackedRow]:
    free = list(range(BLOCK_COUNT))
    rng.shuffle(free)
    rows: list[PackedRow] = []
    for _ in range(rng.randint(1, 9)):
        start = rng.choice([0, 0, 1, rng.randint(1, 60), rng.randint(100, 140)])
        count = rng.choice([1, 1, 1, 2, rng.randint(1, 40)])
        needed = -(-(start + count) // block_size)
        if needed > len(free):
            break
        taken, free = free[:needed], free[needed:]
        rows.append(PackedRow(list(range(count)), start, array("q", taken)))
    return rows


@pytest.mark.parametrize("can_merge", [True, False])
@pytest.mark.parametrize("window", [None, 1, 7, 64])
@pytest.mark.parametrize(("query_heads", "kv_heads", "head_dim", "block_size"), [(4, 2, 8, 16), (3, 3, 16, 5), (8, 1, 8, 1)])
def test_packed_is_plain(query_heads: int, kv_heads: int, head_dim: int, block_size: int, window: int | None, can_merge: bool) -> None:
    for seed in range(6):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        packed_storage, plain_storage = (storage_of(block_size, kv_heads, head_dim) for _ in range(2))
        rows = random_rows(rng, block_size)
        batch = BatchPacker(packed_storage.layout, torch.device("cpu")).pack(rows)
        token_count = batch.input_ids.shape[1]
        packed, plain = PackedAttention(packed_storage, batch), PlainAttention(plain_storage, batch)
        assert packed._can_merge  # with the torch that we test with
        packed._can_merge = can_merge
        for layer in (2, 0):
            query = torch.randn(1, query_heads, token_count, head_dim)
            key, value = torch.randn(2, 1, kv_heads, token_count, head_dim)
            found = packed.attend(layer, query, key, value, 0.3, window)
            expected = plain.attend(layer, query, key, value, 0.3, window)
            assert found.shape == (1, token_count, query_heads, head_dim)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(packed_storage.pages, plain_storage.pages)


def test_packing_keeps_track_of_every_row() -> None:
    rng = random.Random(3)
    storage = storage_of(16, 1, 2)
    rows = [
        PackedRow([rng.randrange(100) for _ in range(count)], start, array("q", range(20 * i, 20 * i + 20)))
        for i, (start, count) in enumerate([(0, 5), (30, 1), (0, 1), (16, 20), (200, 1)])
    ]
    batch = BatchPacker(storage.layout, torch.device("cpu")).pack(rows)
    ids, positions = batch.input_ids[0].tolist(), batch.position_ids[0].tolist()
    for place, row_number in enumerate(batch.order):
        row, last = rows[row_number], batch.last_tokens[place]
        first = last - len(row.token_ids) + 1
        assert ids[first : last + 1] == row.token_ids
        assert positions[first : last + 1] == list(range(row.start, row.length))
        for token in range(first, last + 1):
            position = positions[token]
            block = row.block_ids[position // 16]
            for layer in range(LAYERS):
                key_slot = ((block * LAYERS + layer) * 2) * 16 + position % 16
                assert batch.slot_rows[layer, :, token].tolist() == [key_slot, key_slot + 16]


def test_long_and_short_contexts_are_not_padded_to_each_other() -> None:
    storage = storage_of(16, 1, 2)
    lengths = [3000, 2990, 20, 18, 5]
    rows = [PackedRow([1], length - 1, array("q", [i % 200 for i in range(200)])) for length in lengths]
    groups = BatchPacker(storage.layout, torch.device("cpu")).pack(rows).groups
    assert [group.lengths for group in groups] == [(3000, 2990), (20, 18, 5)]
