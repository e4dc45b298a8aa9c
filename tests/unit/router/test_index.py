from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from polyphase.core.ids import SequenceHash, WorkerId
from polyphase.router import NaivePrefixIndex
from tests.unit.router.builders import prefix

A, B = WorkerId("a"), WorkerId("b")
WORKERS = st.sampled_from([A, B, WorkerId("c")])
HASHES = st.lists(st.integers(0, 7).map(SequenceHash), max_size=6)


def test_depth_is_of_leading_blocks_only():
    index = NaivePrefixIndex()
    prompt = prefix(1, 4)
    index.store(A, prompt)
    index.store(B, [prompt[0], prompt[2], prompt[3]])  # block 1 was evicted: 2 and 3 are of no use

    assert index.match(prompt) == {A: 4, B: 1}
    assert index.match(prompt[:2]) == {A: 2, B: 1}
    assert index.match(prompt[1:]) == {A: 3}
    assert index.match(prefix(2, 4)) == {}
    assert index.match([]) == {}


def test_clear_forgets_one_worker_only():
    index = NaivePrefixIndex()
    index.store(A, prefix(1, 3))
    index.store(B, prefix(1, 2))
    index.clear(A)
    index.clear(A)
    assert index.match(prefix(1, 3)) == {B: 2}
    assert (index.block_count(A), index.block_count(B)) == (0, 2)


def test_removing_what_is_not_held_changes_nothing():
    index = NaivePrefixIndex()
    index.store(A, prefix(1, 1))
    index.remove(A, prefix(2, 1))
    index.remove(B, prefix(1, 1))
    assert index.match(prefix(1, 1)) == {A: 1}


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("store"), WORKERS, HASHES),
            st.tuples(st.just("remove"), WORKERS, HASHES),
            st.tuples(st.just("clear"), WORKERS, st.just([])),
        ),
        max_size=30,
    ),
    HASHES,
)
def test_equals_a_set_per_worker(changes: list[tuple[str, WorkerId, list[SequenceHash]]], prompt: list[SequenceHash]):
    index = NaivePrefixIndex()
    model: dict[WorkerId, set[SequenceHash]] = {}
    for change, worker_id, hashes in changes:
        held = model.setdefault(worker_id, set())
        if change == "store":
            index.store(worker_id, hashes)
            held.update(hashes)
        elif change == "remove":
            index.remove(worker_id, hashes)
            held.difference_update(hashes)
        else:
            index.clear(worker_id)
            held.clear()

    expected = {}
    for worker_id, held in model.items():
        depth = 0
        while depth < len(prompt) and prompt[depth] in held:
            depth += 1
        if depth:
            expected[worker_id] = depth
        assert index.block_count(worker_id) == len(held)
    assert index.match(prompt) == expected
