"""Each scorer says what its unit promises, of each leg."""

from __future__ import annotations

from array import array

import pytest

from polyphase.core.ids import Epoch, WorkerId
from polyphase.router.cost import block_count_needed, in_flight_count, queued_prefill_tokens, usable_block_count, used_block_count
from polyphase.router.indexes import NaivePrefixIndex
from polyphase.router.lineup import Lineup, Standings
from polyphase.router.parts import BUILT_IN
from polyphase.router.types import Leg, RouteRequest, WorkerView
from polyphase.wire.events import Load, Tier
from tests.unit.router.builders import facts, prefix, request, view

WHOLE_PROMPT = 64 * 16


def costs(name: str, workers: list[WorkerView] | Lineup, asked: RouteRequest | None = None, leg: Leg = Leg.BOTH) -> list[float] | None:
    lineup = workers if isinstance(workers, Lineup) else Lineup.of_views(workers)
    found = BUILT_IN.scorer(name).costs(asked or request(), leg, lineup)
    return None if found is None else list(found)


def test_uncached_are_the_tokens_to_compute():
    assert costs("uncached", [view(), view(overlap=60)]) == [WHOLE_PROMPT, 64]
    assert costs("uncached", [view(overlap=60)], leg=Leg.PREFILL) == [64]
    assert costs("uncached", [view(overlap=60)], leg=Leg.DECODE) is None


def test_on_a_decode_leg_they_are_moved():
    assert costs("moved", [view(), view(overlap=60)], leg=Leg.DECODE) == [WHOLE_PROMPT, 64]
    assert costs("moved", [view()]) is None


def test_each_tier_counts_what_the_faster_ones_do_not_hold():
    index = NaivePrefixIndex()
    a, b = WorkerId("a"), WorkerId("b")
    index.store(a, prefix(1, 10))
    index.store(a, prefix(1, 30)[10:], Tier.HOST)
    index.store(b, prefix(1, 40), Tier.DISK)
    lineup = Lineup(Standings([view("a"), view("b")], 10), index.match(prefix(1, 64)))
    assert costs("uncached", lineup) == [WHOLE_PROMPT - 480, WHOLE_PROMPT - 640]
    assert costs("host", lineup) == [320, 0]
    assert costs("disk", lineup) == [0, 640]
    assert costs("object", lineup) == [0, 0]
    assert costs("host", lineup, leg=Leg.DECODE) is None
    coming = Lineup(lineup.standings, lineup.overlaps, {a: 20, b: 50})
    assert (costs("host", coming), costs("disk", coming), costs("uncached", coming)) == ([160, 0], [0, 0], [544, 224])


def test_without_lower_tiers_their_parts_cost_nothing():
    assert [costs(name, [view(overlap=3)]) for name in ("host", "disk", "object")] == [None] * 3


def test_reported_load_and_bookings_are_not_added_up():
    load = Load(waiting_prefill_tokens=900, used_block_count=50, running_count=2, waiting_count=1)
    same_requests = WorkerView(facts("w"), load, 0, 900, 50, 1)
    ours_came_after = WorkerView(facts("w"), load, 0, 100, 7, 1, 100, 7, 1)
    not_yet_reported = WorkerView(facts("w"), None, 0, 100, 7, 1, 100, 7, 1)
    views = [same_requests, ours_came_after, not_yet_reported]
    assert list(map(queued_prefill_tokens, views)) == costs("queued", views) == [900, 1000, 100]
    assert list(map(used_block_count, views)) == [50, 57, 7]
    assert costs("decode", views) == [800, 912, 112]
    assert list(map(in_flight_count, views)) == costs("requests", views) == [3, 4, 1]


def test_overflow_is_what_finds_no_room():
    assert costs("overflow", [view(blocks=900), view(blocks=990), view(blocks=1010)]) == [0, 1040 - 160, 1040 + 160]
    assert costs("overflow", [view(), view(blocks=100)]) is None


def test_a_session_is_drawn_to_where_it_was():
    standings = Standings([view("a"), view("b")], 10)

    def of_home(name: str, epoch: int = 1, rows: list[int] | None = None) -> list[float] | None:
        lineup = Lineup(standings, Lineup.of_views([]).overlaps, home=(WorkerId(name), Epoch(epoch)))
        lineup.rows = rows
        return costs("session", lineup)

    assert of_home("b") == [1, 0]
    assert of_home("gone") is None
    assert of_home("b", epoch=2) is None  # another life of the worker: its cache is another
    assert of_home("b", rows=[0]) is None  # a filter took it out
    assert costs("session", [view()]) is None


def test_labels_that_differ():
    workers = [view(labels={"zone": "a", "rack": "1"}), view(labels={"zone": "a"}), view(labels={"zone": "b", "rack": "1"}), view()]
    assert costs("labels", workers, request(prefers={"zone": "a", "rack": "1"})) == [0, 1, 1, 2]
    assert costs("labels", workers) is None


def test_a_decode_worker_near_the_prefill_worker_has_less_far_to_move():
    standings = Standings([view("a", labels={"zone": "x", "rack": "1"}), view("b", labels={"zone": "x"}), view("c")], 10)
    near = Lineup(standings, Lineup.of_views([]).overlaps, partner=facts("p", labels={"zone": "x", "rack": "1"}))
    assert costs("distance", near, leg=Leg.DECODE) == [0, WHOLE_PROMPT, 2 * WHOLE_PROMPT]
    assert costs("distance", near) is None
    assert costs("distance", Lineup(standings, near.overlaps, partner=facts("p")), leg=Leg.DECODE) is None


def test_blocks_needed_count_the_answer_but_not_its_whole_bound():
    assert block_count_needed(request(output=16), 16, Leg.BOTH) == 65
    assert block_count_needed(request(output=100_000), 16, Leg.BOTH) == 72
    assert block_count_needed(request(output=16), 16, Leg.PREFILL) == 64
    assert block_count_needed(request(hashes=[], tokens=1, output=1), 16, Leg.BOTH) == 1


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 0), (16, 0), (17, 1), (32, 1), (33, 2)])
def test_a_block_that_ends_with_the_prompt_is_of_no_use(tokens: int, blocks: int):
    assert usable_block_count(tokens, 16) == blocks


def test_a_lineup_is_a_sequence_of_views():
    views = [view("a", overlap=3), view("b", prefill=7), view("c", overlap=5, blocks=2)]
    lineup = Lineup.of_views(views)
    assert (list(lineup), len(lineup), lineup[1:], lineup[-1]) == (views, 3, views[1:], views[2])
    assert lineup.depths() == [3, 0, 5]
    assert list(lineup.tokens_beyond(60)) == [12, 60, 0]


def test_standings_follow_one_worker_at_a_time():
    views = [view("a", prefill=5), view("b", blocks=400, requests=3), view("c")]
    standings = Standings(views, 10)
    assert (standings.has_room_everywhere(9600), standings.has_room_everywhere(9601)) == (True, False)
    for changed in (view("b", blocks=100), view("c", prefill=9, blocks=999, requests=80), view("c", requests=1), view("d", prefill=1)):
        standings.note(changed)
        views = [changed if one.facts.worker_id == changed.facts.worker_id else one for one in views]
        fresh = Standings(views, 10)
        for name in ("queued_tokens", "used_tokens", "room_tokens", "request_counts", "full_rows", "views"):
            assert getattr(standings, name) == getattr(fresh, name), name
        assert standings.has_room_everywhere(int(min(fresh.room_tokens)))
        assert not standings.has_room_everywhere(int(min(fresh.room_tokens)) + 1)


def test_columns_of_labels_are_kept_but_not_for_ever():
    standings = Standings([view(labels={"zone": "a"})], 10)
    for number in range(1000):
        assert standings.differing_labels({"zone": str(number)}) == array("d", [1.0])
    assert standings.differing_labels({"zone": "a"}) == array("d", [0.0])
    assert len(standings._label_columns) <= 64
