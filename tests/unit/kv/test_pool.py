"""The block pool's rules, one at a time."""

from __future__ import annotations

import pytest

from polyphase.core.errors import KvError
from polyphase.core.ids import ContentKey, SequenceHash
from polyphase.kv import BlockPool
from polyphase.wire.events import BlocksRemoved, BlocksStored


def key(number: int) -> ContentKey:
    return ContentKey(number.to_bytes(32, "little"))


def cached(pool: BlockPool, *numbers: int) -> list[int]:
    """Blocks named by these numbers, allocated together and still held."""
    blocks = pool.allocate(len(numbers))
    for block_id, number in zip(blocks, numbers, strict=True):
        assert pool.name(block_id, key(number), SequenceHash(number))
    return blocks


def test_blocks_are_given_once() -> None:
    pool = BlockPool(4)
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]
    assert (pool.available_count, pool.used_count) == (0, 4)


def test_asking_for_too_many_takes_none() -> None:
    pool = BlockPool(4)
    with pytest.raises(KvError, match="5 blocks asked of a pool with 4 available"):
        pool.allocate(5)
    assert pool.available_count == 4


def test_double_free_is_an_error() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(KvError, match="released more often"):
        pool.release(blocks)


def test_retaining_a_free_block_is_an_error() -> None:
    pool = BlockPool(2)
    with pytest.raises(KvError, match="is free"):
        pool.retain([0])


def test_naming_twice_or_without_reference_is_an_error() -> None:
    pool = BlockPool(2)
    (block_id,) = cached(pool, 7)
    with pytest.raises(KvError, match="second time"):
        pool.name(block_id, key(8), SequenceHash(8))
    with pytest.raises(KvError, match="nobody refers"):
        pool.name(1 - block_id, key(9), SequenceHash(9))


def test_a_released_prefix_is_found_again_and_evicted_from_its_end() -> None:
    pool = BlockPool(3)
    blocks = cached(pool, 1, 2, 3)
    pool.release(blocks)
    assert pool.match([key(1), key(2), key(3), key(4)]) == blocks
    pool.allocate(1)
    assert pool.match([key(1), key(2), key(3)]) == blocks[:2]
    pool.allocate(1)
    assert pool.match([key(1), key(2), key(3)]) == blocks[:1]


def test_the_longest_unused_is_evicted_first() -> None:
    pool = BlockPool(2)
    (first,), (second,) = cached(pool, 1), cached(pool, 2)
    pool.release([first])
    pool.release([second])
    pool.retain([first])
    pool.release([first])  # used again just now
    assert pool.allocate(1) == [second]
    assert pool.match([key(1)]) == [first]


def test_what_is_free_is_taken_before_anything_is_evicted() -> None:
    pool = BlockPool(3)
    pool.release(cached(pool, 1))
    pool.allocate(2)
    assert len(pool.match([key(1)])) == 1


def test_the_same_prefix_computed_twice_is_announced_once() -> None:
    pool = BlockPool(2)
    (first,) = cached(pool, 1)
    (second,) = pool.allocate(1)
    assert not pool.name(second, key(1), SequenceHash(1))
    pool.release([second])
    assert pool.journal.take() == [BlocksStored([1])]
    pool.release([first])
    pool.allocate(2)
    assert pool.journal.take() == [BlocksRemoved([1])]


def test_a_hash_shared_by_two_keys_is_withdrawn_with_the_last() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    for block_id, number in zip(blocks, (1, 2), strict=True):
        pool.name(block_id, key(number), SequenceHash(99))
    assert pool.journal.take() == [BlocksStored([99])]
    pool.release(blocks)
    pool.allocate(1)
    assert pool.journal.take() == []
    pool.allocate(1)
    assert pool.journal.take() == [BlocksRemoved([99])]


def test_events_keep_their_order() -> None:
    pool = BlockPool(1)
    pool.release(cached(pool, 1))
    pool.release(cached(pool, 2))
    cached(pool, 1)
    assert pool.journal.take() == [
        BlocksStored([1]),
        BlocksRemoved([1]),
        BlocksStored([2]),
        BlocksRemoved([2]),
        BlocksStored([1]),
    ]
    assert pool.journal.held() == {1}


def test_disowned_blocks_are_found_no_more() -> None:
    pool = BlockPool(3)
    blocks = cached(pool, 1, 2)
    pool.retain(blocks[:1])  # somebody else relies on the first
    assert pool.disown(blocks) == blocks[1:]
    assert pool.match([key(1), key(2)]) == blocks[:1]
    pool.release(blocks)
    pool.release(blocks[:1])
    pool.check_invariants()
    assert pool.idle_count == 1


def test_broken_books_are_noticed() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    pool._free.append(pool._free[-1])
    with pytest.raises(KvError, match="free twice"):
        pool.check_invariants()
