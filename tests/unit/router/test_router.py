from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from polyphase.core.errors import ConfigurationError, NoWorkers, Overloaded
from polyphase.core.ids import Epoch, RequestId, WorkerId
from polyphase.router import Leg, PolicySettings, Route, Router, RouterSettings, SplitRule
from polyphase.wire.cards import Role
from polyphase.wire.events import AllCleared, BlocksRemoved, BlocksStored, Load, Tier
from tests.unit.router.builders import facts, prefix, request, router_with

E1, E2 = Epoch(1), Epoch(2)


def overlap_of(router: Router, worker_id: str, name: int = 1, block_count: int = 10) -> int:
    """Blocks of a prompt that the router believes to be on a worker, as seen in a decision that is not kept."""
    route = router.route(request("probe", prefix(name, block_count)))
    router.release(RequestId("probe"))
    return next(c.overlap_block_count for c in route.decode.candidates if c.worker_id == worker_id)


class TestRoles:
    def test_one_worker_for_both_serves_whole(self):
        route = router_with(facts("w")).route(request())
        assert route.prefill is None
        assert (route.decode.worker_id, route.decode.leg, route.decode.epoch) == ("w", Leg.BOTH, 1)

    def test_prefill_and_decode_split_a_long_prompt(self):
        route = router_with(facts("p", Role.PREFILL), facts("d", Role.DECODE)).route(request())
        assert route.prefill is not None
        assert (route.prefill.worker_id, route.prefill.leg) == ("p", Leg.PREFILL)
        assert (route.decode.worker_id, route.decode.leg) == ("d", Leg.DECODE)
        assert "1024 of 1024" in route.reason

    def test_prefill_workers_alone_serve_whole(self):
        route = router_with(facts("p", Role.PREFILL)).route(request())
        assert (route.prefill, route.decode.worker_id) == (None, "p")

    def test_decode_workers_alone_serve_whole(self):
        route = router_with(facts("d0", Role.DECODE), facts("d1", Role.DECODE)).route(request())
        assert route.prefill is None
        assert "no prefill worker" in route.reason

    def test_workers_for_both_do_not_prefill_for_decode_workers(self):
        route = router_with(facts("b"), facts("d", Role.DECODE)).route(request())
        assert route.prefill is None

    def test_a_prefill_worker_that_cannot_hand_over_gets_nothing_from_others(self):
        route = router_with(facts("p", Role.PREFILL, can_hand_over=False), facts("d", Role.DECODE)).route(request())
        assert (route.prefill, route.decode.worker_id) == (None, "d")

    def test_when_every_decode_worker_was_tried_a_prefill_worker_steps_in(self):
        router = router_with(facts("p", Role.PREFILL), facts("d", Role.DECODE))
        route = router.route(request(excluded=("d",)))
        assert (route.prefill, route.decode.worker_id) == (None, "p")

    def test_a_role_switched_live_counts_at_once(self):
        router = router_with(facts("a", Role.DECODE), facts("b", Role.DECODE))
        router.upsert_worker(facts("a", Role.PREFILL))
        route = router.route(request())
        assert route.prefill is not None
        assert (route.prefill.worker_id, route.decode.worker_id) == ("a", "b")

    def test_draining_workers_get_nothing_new(self):
        router = router_with(facts("a"), facts("b", is_draining=True), facts("p", Role.PREFILL, is_draining=True))
        routes = [router.route(request(str(number))) for number in range(6)]
        assert {route.decode.worker_id for route in routes} == {"a"}
        assert all(route.prefill is None for route in routes)

    def test_who_sleeps_gets_nothing_until_it_is_awake(self):
        asleep = replace(facts("b"), is_asleep=True)
        router = router_with(facts("a"), asleep)
        assert {router.route(request(str(number))).decode.worker_id for number in range(4)} == {"a"}
        router = router_with(asleep)
        with pytest.raises(NoWorkers, match="is asleep"):
            router.route(request())
        router.upsert_worker(facts("b"))
        assert router.route(request()).decode.worker_id == "b"


class TestSplit:
    def split_pair(self, **rule: float) -> Router:
        return router_with(facts("p", Role.PREFILL), facts("d", Role.DECODE), split=SplitRule(**rule))  # type: ignore[arg-type]

    def test_short_prompts_are_not_split(self):
        router = self.split_pair(min_uncached_tokens=256)
        assert router.route(request("a", prefix(1, 15), tokens=255)).prefill is None
        assert router.route(request("b", prefix(2, 16), tokens=256)).prefill is not None

    def test_prompts_mostly_cached_on_the_decode_side_are_not_split(self):
        router = self.split_pair(min_uncached_tokens=0, min_uncached_fraction=0.3)
        router.replace_blocks(WorkerId("d"), E1, prefix(1, 75))
        route = router.route(request("a", prefix(1, 100)))
        assert route.prefill is None
        assert route.reason == "whole: 1200 of 1600 prompt tokens are cached on d"
        router.replace_blocks(WorkerId("d"), E1, prefix(1, 69))
        assert router.route(request("a", prefix(1, 100))).prefill is not None

    def test_a_conversation_stays_where_its_prefix_is(self):
        router = router_with(facts("p", Role.PREFILL), facts("d0", Role.DECODE), facts("d1", Role.DECODE))
        router.replace_blocks(WorkerId("d1"), E1, prefix(1, 60))
        route = router.route(request("a", prefix(1, 64)))
        assert (route.prefill, route.decode.worker_id, route.decode.overlap_block_count) == (None, "d1", 60)

    def test_when_prefill_workers_are_full_decode_workers_do_it_all(self):
        router = router_with(facts("p", Role.PREFILL, max_running=1), facts("d", Role.DECODE), max_waiting_requests=1)
        routes = [router.route(request(str(number), prefix(number, 64))) for number in range(3)]
        assert [route.prefill is not None for route in routes] == [True, True, False]

    def test_prefill_goes_where_the_prefix_is(self):
        router = router_with(facts("p0", Role.PREFILL), facts("p1", Role.PREFILL), facts("d", Role.DECODE))
        router.replace_blocks(WorkerId("p1"), E1, prefix(1, 60))
        prefill = router.route(request()).prefill
        assert prefill is not None
        assert (prefill.worker_id, prefill.overlap_block_count) == ("p1", 60)


class TestBooking:
    def test_whole_request(self):
        router = router_with(facts("w"))
        router.route(request("r", output=1000))
        booked = router.bookings.of(WorkerId("w"))
        assert (booked.prefill_tokens, booked.block_count, booked.request_count) == (1024, 64 + 8, 1)
        router.mark_prefill_done(RequestId("r"))
        assert (booked.prefill_tokens, booked.block_count) == (0, 72)
        router.release(RequestId("r"))
        assert router.bookings.total().is_zero()

    def test_cached_tokens_are_not_booked(self):
        router = router_with(facts("w"))
        router.replace_blocks(WorkerId("w"), E1, prefix(1, 60))
        router.route(request("r"))
        assert router.bookings.of(WorkerId("w")).prefill_tokens == 64

    def test_split_request(self):
        router = router_with(facts("p", Role.PREFILL), facts("d", Role.DECODE))
        router.route(request("r"))
        assert router.bookings.of(WorkerId("p")).prefill_tokens == 1024
        assert router.bookings.of(WorkerId("d")).prefill_tokens == 0
        router.mark_prefill_done(RequestId("r"))
        assert router.bookings.of(WorkerId("p")).is_zero()
        assert router.bookings.of(WorkerId("d")).block_count == 65
        router.release(RequestId("r"))
        router.release(RequestId("r"))
        assert router.bookings.total().is_zero()

    def test_migration_books_anew(self):
        router = router_with(facts("a"), facts("b"))
        first = router.route(request("r")).decode.worker_id
        second = router.route(request("r", excluded=(first,))).decode.worker_id
        assert first != second
        assert router.bookings.of(first).is_zero()
        assert router.bookings.total().request_count == 1

    def test_a_removed_worker_takes_its_bookings_along(self):
        router = router_with(facts("a"))
        router.route(request("r"))
        router.remove_worker(WorkerId("a"))
        router.remove_worker(WorkerId("a"))
        assert router.bookings.total().is_zero()
        router.mark_prefill_done(RequestId("r"))
        router.release(RequestId("r"))
        router.bookings.check()

    def test_a_refused_request_books_nothing(self):
        router = router_with(facts("a"))
        router.route(request("r"))
        with pytest.raises(NoWorkers):
            router.route(request("r", excluded=("a",)))
        assert router.bookings.total().is_zero()


class TestLives:
    def test_a_new_epoch_forgets_the_old_life(self):
        router = router_with(facts("a"))
        router.replace_blocks(WorkerId("a"), E1, prefix(1, 10))
        router.report_load(WorkerId("a"), E1, Load(waiting_prefill_tokens=5))
        router.route(request("r"))
        router.upsert_worker(facts("a", epoch=2))
        assert router.bookings.total().is_zero()
        assert overlap_of(router, "a") == 0
        assert router.workers()[0].load is None

    def test_the_same_epoch_keeps_what_is_known(self):
        router = router_with(facts("a"))
        router.replace_blocks(WorkerId("a"), E1, prefix(1, 10))
        router.upsert_worker(facts("a", Role.DECODE))
        assert overlap_of(router, "a") == 9  # the tenth block ends with the prompt

    def test_news_of_another_life_is_ignored(self):
        router = router_with(facts("a", epoch=2))
        router.replace_blocks(WorkerId("a"), E1, prefix(1, 10))
        router.apply(WorkerId("a"), E1, [BlocksStored(list(prefix(1, 10)))])
        router.report_load(WorkerId("a"), E1, Load(running_count=1))
        router.upsert_worker(facts("a", Role.PREFILL, epoch=1))
        assert overlap_of(router, "a") == 0
        assert router.workers()[0].load is None
        assert router.workers()[0].facts.role is Role.BOTH

    def test_news_of_an_unknown_worker_is_ignored(self):
        router = router_with(facts("a"))
        router.replace_blocks(WorkerId("ghost"), E1, prefix(1, 10))
        router.apply(WorkerId("ghost"), E1, [AllCleared()])
        router.report_load(WorkerId("ghost"), E1, Load())
        router.upsert_worker(facts("ghost"))
        assert overlap_of(router, "ghost") == 0


def test_events_change_what_is_known():
    router = router_with(facts("a"))
    a, hashes = WorkerId("a"), list(prefix(1, 10))
    router.apply(a, E1, [BlocksStored(hashes), BlocksRemoved(hashes[8:])])
    assert overlap_of(router, "a") == 8
    router.apply(a, E1, [BlocksStored(hashes, Tier.DISK), BlocksRemoved(hashes, Tier.HOST)])
    assert overlap_of(router, "a") == 8
    router.apply(a, E1, [AllCleared()])
    assert overlap_of(router, "a") == 0
    router.replace_blocks(a, E1, prefix(1, 10))
    router.replace_blocks(a, E1, prefix(1, 3))
    assert overlap_of(router, "a") == 3


class TestRefusals:
    def test_no_worker(self):
        with pytest.raises(NoWorkers, match="'demo'") as caught:
            router_with().route(request())
        assert caught.value.retry_after_s >= 1
        assert caught.value.request_id == "r"

    def test_another_model(self):
        router = router_with(facts("a", model="other"))
        assert router.serves("other")
        assert not router.serves("demo")
        with pytest.raises(NoWorkers, match="no worker serves the model 'demo'"):
            router.route(request())

    def test_all_draining(self):
        router = router_with(facts("a", is_draining=True))
        assert router.serves("demo")
        with pytest.raises(NoWorkers, match="draining"):
            router.route(request())

    def test_all_tried(self):
        with pytest.raises(NoWorkers, match=r"each of the 2 workers .* tried"):
            router_with(facts("a"), facts("b")).route(request(excluded=("a", "b")))

    def test_all_full(self):
        router = router_with(facts("a", max_running=1), facts("b", max_running=1), max_waiting_requests=1)
        for number in range(4):
            router.route(request(str(number)))
        with pytest.raises(Overloaded, match="each of the 2 workers"):
            router.route(request("one too many"))
        router.release(RequestId("2"))
        router.route(request("now"))

    def test_unknown_policy(self):
        with pytest.raises(ConfigurationError, match="choose one of"):
            Router(RouterSettings(PolicySettings("random")))


class TestSpread:
    """Under `kv`, cached prefixes attract; under every policy, no worker starves or is pinned."""

    def test_a_hot_system_prompt_does_not_pin_everything_to_one_worker(self):
        router = router_with(*(facts(f"w{number}", block_count=100_000) for number in range(4)))
        shared = prefix(1, 100)
        router.replace_blocks(WorkerId("w0"), E1, shared)
        chosen: Counter[str] = Counter()
        for number in range(64):  # all at once: none ends meanwhile
            own = prefix(1000 + number, 4)
            route = router.route(request(str(number), shared + own))
            chosen[route.decode.worker_id] += 1
            router.mark_prefill_done(RequestId(str(number)))
            router.apply(route.decode.worker_id, E1, [BlocksStored(shared + own)])
        assert min(chosen.values()) >= 12, chosen

    def test_one_conversation_at_a_time_stays_put(self):
        router = router_with(*(facts(f"w{number}") for number in range(4)))
        homes = set()
        for turn in range(1, 8):
            conversation = prefix(1, 8 * turn)
            route = router.route(request("r", conversation))
            homes.add(route.decode.worker_id)
            router.apply(route.decode.worker_id, E1, [BlocksStored(list(conversation))])
            router.release(RequestId("r"))
        assert len(homes) == 1

    @pytest.mark.parametrize("policy", ["kv", "least-loaded", "round-robin"])
    def test_equal_requests_spread_evenly(self, policy: str):
        router = router_with(*(facts(f"w{number}") for number in range(5)), policy=policy)
        chosen = Counter(router.route(request(str(number), prefix(number, 8))).decode.worker_id for number in range(50))
        assert set(chosen.values()) == {10}

    @pytest.mark.parametrize("policy", ["kv", "least-loaded", "round-robin"])
    def test_idle_workers_take_turns(self, policy: str):
        router = router_with(*(facts(f"w{number}") for number in range(3)), policy=policy)
        chosen = Counter()
        for number in range(30):
            chosen[router.route(request("r", prefix(number, 8))).decode.worker_id] += 1
            router.release(RequestId("r"))
        assert set(chosen.values()) == {10}

    def test_two_models_in_alternation_each_meet_all_their_workers(self):
        router = router_with(*(facts(f"{model}{n}", model=model) for model in "ab" for n in range(2)), policy="round-robin")
        chosen = Counter(router.route(request(str(n), prefix(n, 8), model="ab"[n % 2])).decode.worker_id for n in range(16))
        assert chosen == {"a0": 4, "a1": 4, "b0": 4, "b1": 4}

    def test_split_requests_spread_on_both_sides(self):
        workers = [facts(f"p{n}", Role.PREFILL) for n in range(2)] + [facts(f"d{n}", Role.DECODE) for n in range(3)]
        router = router_with(*workers, policy="round-robin")
        routes = [router.route(request(str(n), prefix(n, 64))) for n in range(12)]
        assert Counter(route.decode.worker_id for route in routes) == {"d0": 4, "d1": 4, "d2": 4}
        assert Counter(route.prefill.worker_id for route in routes if route.prefill) == {"p0": 6, "p1": 6}

    def test_what_other_frontends_sent_there_counts(self):
        router = router_with(facts("a"), facts("b"))
        router.report_load(WorkerId("a"), E1, Load(waiting_prefill_tokens=5000, used_block_count=300))
        routes = [router.route(request(str(n), prefix(n, 8))) for n in range(10)]
        assert {route.decode.worker_id for route in routes} == {"b"}


def test_a_route_keeps_all_candidates_best_first():
    router = router_with(*(facts(f"w{number}") for number in range(3)))
    router.replace_blocks(WorkerId("w2"), E1, prefix(1, 32))
    router.replace_blocks(WorkerId("w1"), E1, prefix(1, 16))
    candidates = router.route(request()).decode.candidates
    assert [(c.worker_id, c.overlap_block_count) for c in candidates] == [("w2", 32), ("w1", 16), ("w0", 0)]
    assert candidates[0].score == 1.0
    assert candidates[0].score > candidates[1].score > candidates[2].score > 0
    assert candidates[0].booked_prefill_tokens == 0  # as it was before this decision


def test_the_chosen_worker_stands_first_among_equals():
    router = router_with(facts("a"), facts("b"))
    for number in range(4):
        placement = router.route(request(str(number), prefix(number, 4))).decode
        assert placement.candidates[0].worker_id == placement.worker_id


def test_workers_are_listed_with_their_figures():
    router = router_with(facts("b"), facts("a"))
    router.report_load(WorkerId("a"), E1, Load(running_count=3))
    router.route(request("r", excluded=("b",)))
    views = router.workers()
    assert [view.facts.worker_id for view in views] == ["a", "b"]
    assert (views[0].booked_request_count, views[0].load) == (1, Load(running_count=3))


def test_same_calls_same_routes():
    def play() -> list[Route]:
        router = router_with(*(facts(f"w{number}") for number in range(3)), facts("p", Role.PREFILL))
        return [router.route(request(str(number), prefix(number % 4, 40))) for number in range(20)]

    assert play() == play()
