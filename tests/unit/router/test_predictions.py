"""Prefixes on their way: found as far as they are equal, gone when computed or given up, the same as comparing block by block."""

from __future__ import annotations

from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st

from polyphase.core.ids import RequestId, SequenceHash, WorkerId
from polyphase.router.indexes.naive import NaiveOverlaps
from polyphase.router.lineup import Lineup, Standings
from polyphase.router.predictions import ExpectedPrefixes
from polyphase.wire.events import Tier
from tests.unit.router.builders import facts, prefix, request, router_with, view

W, V = WorkerId("w"), WorkerId("v")
R, S = RequestId("r"), RequestId("s")


def deepened(expected: ExpectedPrefixes, hashes: list[SequenceHash], depths: dict[WorkerId, int]) -> dict[WorkerId, int]:
    """What workers hold or are going to hold; asked of the line-up in all of its ways."""
    overlaps = NaiveOverlaps(dict.fromkeys(Tier, depths))
    beyond = expected.beyond(hashes, overlaps)
    assert all(depth > depths.get(worker_id, 0) for worker_id, depth in beyond.items())
    lineup = Lineup(Standings([view("w"), view("v")], 10), overlaps, beyond)
    found = [lineup.depth(0), lineup.depth(1)]
    assert lineup.depths() == [one.overlap_block_count for one in lineup] == found
    assert list(lineup.tokens_beyond(1000)) == [1000 - 16 * depth for depth in found]
    return {worker_id: depth for worker_id, depth in zip((W, V), found, strict=True) if depth}


def test_what_is_under_way_counts_until_it_is_computed() -> None:
    expected = ExpectedPrefixes()
    expected.expect(R, W, prefix(1, 10))
    assert deepened(expected, prefix(1, 6), {}) == {W: 6}
    assert deepened(expected, prefix(1, 20), {W: 3, V: 1}) == {W: 10, V: 1}
    assert deepened(expected, prefix(1, 20), {W: 12}) == {W: 12}
    assert deepened(expected, prefix(2, 6), {V: 2}) == {V: 2}
    expected.settle(R)
    expected.settle(R)
    assert deepened(expected, prefix(1, 6), {}) == {}
    assert len(expected) == 0


def test_only_what_is_new_of_a_request_is_looked_for() -> None:
    expected = ExpectedPrefixes()
    expected.expect(R, W, prefix(1, 10), 4)
    assert deepened(expected, prefix(1, 4), {W: 4}) == {W: 4}
    assert deepened(expected, prefix(1, 8), {W: 4}) == {W: 8}
    expected.expect(R, W, prefix(1, 10), 10)
    assert len(expected) == 0  # nothing new is on its way


def test_a_lost_worker_computes_nothing_any_more() -> None:
    expected = ExpectedPrefixes()
    expected.expect(R, W, prefix(1, 10))
    expected.expect(S, V, prefix(1, 4))
    expected.drop_worker(W)
    assert deepened(expected, prefix(1, 10), {}) == {V: 4}


prompts = st.builds(
    lambda same, other: (
        [SequenceHash(place) for place in range(same)] + [SequenceHash(10_000 * same + 1000 * other + place) for place in range(same, 12)]
    ),
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
    assert deepened(expected, asked, depths) == truth


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
