"""Whatever network, workers and frontends do: when it is calm again, each index shows the truth of each worker, in all tiers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyphase.core import native
from polyphase.core.ids import WorkerId
from polyphase.router import NaivePrefixIndex, PrefixIndex, native_index
from polyphase.wire.events import Tier
from tests.unit.runtime.network import MS, QUIET_NS, Network

INDEXES: list[Callable[[], PrefixIndex]] = [NaivePrefixIndex, native_index if native.is_native() else NaivePrefixIndex]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_every_index_converges_to_the_truth(seed: int) -> None:
    network = Network(seed, INDEXES)
    network.run_for(100 * MS)
    network.storm(120)
    network.calm_down()
    network.assert_truth()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_nothing_drifts_by_itself(seed: int) -> None:
    """Without damage to an index no digest ever differs: what converges does so by the fence, not because drift is mended."""
    network = Network(seed, INDEXES, can_corrupt=False)
    network.run_for(100 * MS)
    network.storm(120)
    network.calm_down()
    network.assert_truth()
    assert {fence.counts.drifts for fence in network.all_fences} == {0}


def fetched(network: Network) -> list[tuple[int, int]]:
    fences = [fence for frontend in network.frontends for fence in frontend.fences.values()]
    return [(fence.counts.snapshots, fence.counts.repairs) for fence in fences]


def test_without_faults_one_snapshot_is_all_that_is_fetched() -> None:
    network = Network(1, INDEXES)
    network.run_for(100 * MS)
    network.calm_down()
    network.assert_truth()
    assert {snapshots for snapshots, _ in fetched(network)} == {1}


@pytest.mark.parametrize("make_index", INDEXES)
def test_a_corrupted_index_is_mended_within_a_heartbeat(make_index: Callable[[], PrefixIndex], caplog: pytest.LogCaptureFixture) -> None:
    network = Network(2, [make_index])
    network.run_for(100 * MS)
    network.calm_down()
    (frontend,) = network.frontends
    invented = 10**9
    frontend.sink.router.index.store(WorkerId("w1"), [invented], Tier.DISK)  # type: ignore[list-item]
    network.publish(network.workers["w1"], [])
    network.run_for(50 * MS)
    network.assert_truth()
    assert frontend.fences["w1"].counts.drifts == 1
    (line,) = [record.message for record in caplog.records if "drifted" in record.message]
    assert "worker w1" in line
    assert "disk: knows" in line


def test_an_index_without_room_is_not_taken_for_a_drifted_one() -> None:
    network = Network(3, [lambda: NaivePrefixIndex(15), *([lambda: native_index(15)] if native.is_native() else [])])
    network.run_for(100 * MS)
    network.calm_down()
    for frontend in network.frontends:
        assert frontend.sink.router.index.forgotten > 0
        assert [fence.counts.drifts for fence in frontend.fences.values()] == [0, 0, 0]


@pytest.mark.parametrize("make_index", INDEXES)
def test_damage_that_comes_again_and_again_does_not_make_a_loop_of_snapshots(make_index: Callable[[], PrefixIndex]) -> None:
    network = Network(4, [make_index])
    network.run_for(100 * MS)
    (frontend,) = network.frontends
    for _ in range(QUIET_NS // (200 * MS)):
        frontend.sink.router.index.store(WorkerId("w0"), [network.rng.randrange(10**9)])  # type: ignore[list-item]
        for _ in range(4):  # one of these finds that a snapshot helped
            network.publish(network.workers["w0"], [])
            network.run_for(50 * MS)
    assert 5 <= frontend.fences["w0"].counts.snapshots <= 14  # of 450 chances
    network.calm_down()
    network.assert_truth()
