"""Prefixes on their way: found as far as they are equal, gone when computed or given up, the same as comparing block by block."""

from __future__ import annotations

from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st

from polyphase.core.ids import RequestId, SequenceHash, WorkerId
from polyphase.router.predictions import ExpectedPrefixes
from tests.unit.router.builders import facts, prefix, request, router_with

W, V = WorkerId("w"), WorkerId("v")
R, S = RequestId("r"), RequestId("s")


def test_what_is_under_way_counts_until_it_is_computed() -> None:
    expected = ExpectedPrefixes()
    expected.expect(R, W, prefix(1, 10))
    assert expected.deepen(prefix(1, 6), {}) == {W: 6}
    assert expected.deepen(prefix(1, 20), {W: 3, V: 1}) == {W: 10, V: 1}
    assert expected.deepen(prefix(1, 20), {W: 12}) == {W: 12}
    assert expected.deepen(prefix(2, 6), {V: 2}) == {V: 2}
    expected.settle(R)
    expected.settle(R)
    assert expected.deepen(prefix(1, 6), {}) == {}
    assert len(expected) == 0


def test_a_lost_worker_computes_nothing_any_more() -> None:
    expected = ExpectedPrefixes()
    expected.expect(R, W, prefix(1, 10))
    expected.expect(S, V, prefix(1, 4))
    expected.drop_worker(W)
    assert expected.deepen(prefix(1, 10), {}) == {V: 4}


prompts = st.builds(
    lambda same, other: [SequenceHash(place if place < same else 10_000 * same + 1000 * other + place) for place in range(12)],
    st.integers(0, 12),
    st.integers(1, 3),
)


@given(under_way=st.lists(st.tuples(st.sampled_from([W, V]), prompts), max_size=6), asked=prompts, held=st.integers(0, 12))
def test_as_block_by_block(under_way: list[tuple[WorkerId, list[SequenceHash]]], asked: list[SequenceHash], held: int) -> None:
    expected = ExpectedPrefixes()
    for number, (worker_id, hashes) in enumerate(under_way):
        expected.expect(RequestId(str(number)), worker_id, hashes)
    depths = {W: held} if held else {}
    truth = dict(depths)
    for worker_id, hashes in under_way:
        depth = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(hashes, asked, strict=True))))
        if depth:
            truth[worker_id] = max(depth, truth.get(worker_id, 0))
    assert expected.deepen(asked, depths) == truth


def test_requests_with_a_common_prefix_gather_before_it_is_computed() -> None:
    router = router_with(*(facts(name) for name in "abcd"))
    routes = [router.route(request(str(number), prefix(1, 64) + prefix(10 + number, 2))) for number in range(4)]
    assert [route.decode.overlap_block_count for route in routes] == [0, 64, 64, 64]
    assert len({route.decode.worker_id for route in routes}) == 1


def test_a_prefix_hotter_than_one_worker_can_serve_spreads() -> None:
    router = router_with(*(facts(name) for name in "abcd"))
    for number in range(100):
        router.route(request(str(number), prefix(1, 64) + prefix(10 + number, 20)))
    counts = sorted(view.booked_request_count for view in router.workers())
    assert counts[0] >= 20, counts
