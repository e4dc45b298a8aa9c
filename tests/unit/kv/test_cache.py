"""Sequences over the pool: hits, growth, names."""

from __future__ import annotations

import pytest

from polyphase.core.hashing import sequence_hashes
from polyphase.kv import BlockPool, PrefixCache, SequenceBlocks
from polyphase.wire.events import BlocksStored

SIZE = 4


@pytest.fixture
def cache() -> PrefixCache:
    return PrefixCache(BlockPool(16), SIZE, "model")


def computed(cache: PrefixCache, tokens: list[int], salt: str | None = None) -> SequenceBlocks:
    blocks = cache.open(tokens, salt)
    assert cache.admit(blocks, len(tokens), spare_count=0) is not None
    cache.commit(blocks, tokens, len(tokens))
    return blocks


@pytest.mark.parametrize(("count", "hit"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8)])
def test_a_hit_leaves_a_token_to_compute(cache: PrefixCache, count: int, hit: int) -> None:
    tokens = list(range(count))
    cache.close(computed(cache, tokens))
    assert cache.admit(cache.open(tokens, None), count, spare_count=0) == hit


def test_another_salt_or_model_does_not_hit(cache: PrefixCache) -> None:
    tokens = list(range(9))
    cache.close(computed(cache, tokens, "tenant"))
    other_model = PrefixCache(cache.pool, SIZE, "modeltenant")
    for salt, owner in ((None, cache), ("tenant2", cache), ("", other_model)):
        assert owner.admit(owner.open(tokens, salt), 9, spare_count=0) == 0
    assert cache.admit(cache.open(tokens, "tenant"), 9, spare_count=0) == 8


def test_events_carry_the_hashes_of_the_router(cache: PrefixCache) -> None:
    tokens = list(range(11))
    blocks = cache.open(tokens, "tenant")
    cache.admit(blocks, 11, spare_count=0)
    cache.commit(blocks, tokens, 7)
    cache.commit(blocks, tokens, 11)
    hashes = [int(h) for h in sequence_hashes(tokens, SIZE, "tenant")]
    assert cache.pool.journal.take() == [BlocksStored(hashes)]


def test_a_chain_that_grows_is_the_chain_of_the_whole(cache: PrefixCache) -> None:
    tokens = list(range(20))
    blocks = cache.open(tokens[:6], None)
    for end in range(6, 21):
        blocks.chain.extend(tokens[:end])
    whole = cache.open(tokens, None)
    assert blocks.chain.keys == whole.chain.keys
    assert blocks.chain.hashes == whole.chain.hashes == sequence_hashes(tokens, SIZE)


def test_admission_counts_hits_that_were_available_themselves() -> None:
    cache = PrefixCache(BlockPool(3), SIZE, "model")
    tokens = list(range(12))
    cache.close(computed(cache, tokens[:8]))
    assert cache.pool.available_count == 3
    blocks = cache.open(tokens, None)
    assert cache.admit(blocks, 12, spare_count=1) is None  # two hits and one new block are all there is
    assert cache.pool.available_count == 3
    assert cache.admit(blocks, 12, spare_count=0) == 8
    assert cache.pool.available_count == 0


def test_growth_takes_a_block_when_it_is_needed(cache: PrefixCache) -> None:
    blocks = computed(cache, [1, 2, 3, 4])
    used = cache.pool.used_count
    assert cache.grow(blocks, 4)
    assert cache.pool.used_count == used
    assert cache.grow(blocks, 5)
    assert cache.pool.used_count == used + 1
    assert not cache.grow(blocks, 16 * SIZE + 1)
    assert cache.pool.used_count == used + 1


def test_closing_twice_is_closing_once(cache: PrefixCache) -> None:
    blocks = computed(cache, list(range(6)))
    cache.close(blocks)
    cache.close(blocks)
    cache.pool.check_invariants()
    assert cache.pool.used_count == 0
    assert cache.pool.idle_count == 1
