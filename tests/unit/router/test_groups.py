"""Groups of workers of one model: shares of its requests, the reserve, splits within a group, adapters, blocks of different sizes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyphase.core.errors import NoWorkers
from polyphase.core.hashing import sequence_hashes
from polyphase.core.ids import Epoch, RequestId, SequenceHash, WorkerId
from polyphase.router import PolicySettings, Router, RouteRequest, RouterSettings, SplitRule, WorkerFacts, default_index
from polyphase.router.groups import group_weights
from polyphase.router.overlaps import OverlapsBySize
from polyphase.router.shares import settle
from polyphase.wire.cards import Role
from polyphase.wire.events import BlocksStored, Load

from .builders import facts, prefix, request, router_with


def member(worker_id: str, group: str, weight: float | None = None, role: Role = Role.BOTH, **changes: object) -> WorkerFacts:
    return replace(facts(worker_id, role), group=group, weight=weight, **changes)  # type: ignore[arg-type]


def served(router: Router, count: int, name: int = 1, *, ends: bool = True) -> Counter[str]:
    """How often each worker is chosen for prompts that nobody knows."""
    chosen: Counter[str] = Counter()
    for number in range(count):
        request_id = f"{name}-{number}"
        chosen[router.route(request(request_id, prefix(10_000 * name + number, 4))).decode.worker_id] += 1
        if ends:
            router.release(RequestId(request_id))
    return chosen


# Shares


@pytest.mark.parametrize("policy", ["kv", "least-loaded", "round-robin"])
def test_requests_are_shared_by_the_weights_of_groups(policy: str) -> None:
    router = router_with(member("s0", "stable", 95), member("s1", "stable", 95), member("c", "canary", 5), policy=policy)
    chosen = served(router, 200)
    assert chosen["c"] == 10
    assert chosen["s0"] == chosen["s1"] == 95


def test_without_weights_groups_are_of_no_account() -> None:
    router = router_with(member("a", "torch"), member("b", "vllm"), member("c", "vllm"))
    assert set(served(router, 30).values()) == {10}


def test_a_group_that_states_no_weight_beside_one_that_does_weighs_one() -> None:
    assert group_weights([member("a", "x"), member("b", "y")]) == {}
    assert group_weights([member("a", "x"), member("b", "y", 3), member("c", "y"), member("d", "y", 2)]) == {"x": 1.0, "y": 3.0}
    assert served(router_with(member("a", "x"), member("b", "y", 3)), 40) == {"a": 10, "b": 30}


def test_a_conversation_stays_with_its_prefix_while_shares_are_kept() -> None:
    router = router_with(member("s", "stable", 1), member("c", "canary", 1))
    talk = prefix(7, 400)
    router.apply(WorkerId("c"), Epoch(1), [BlocksStored(list(talk))])
    places = [router.route(request(f"t{turn}", talk)).decode.worker_id for turn in range(4)]
    assert set(places) == {"c"}  # four requests ahead are worth 16k tokens, the prefix 19k
    router.release(RequestId("t0"))
    assert served(router, 4) == {"s": 4}  # made up for by those that lose nothing


def test_what_a_saturated_or_absent_group_missed_is_not_made_up_for() -> None:
    router = router_with(member("s", "stable", 1), member("c", "canary", 1))
    busy = Load(running_count=100, waiting_count=100, waiting_prefill_tokens=10_000)
    router.report_load(WorkerId("c"), Epoch(1), busy)
    router.route(request("keeps-c-busy", prefix(3, 4)))
    assert served(router, 50, 2)["s"] >= 49
    router.remove_worker(WorkerId("c"))
    assert served(router, 50, 3) == {"s": 50}
    router.upsert_worker(member("c", "canary", 1, epoch=Epoch(2)))
    assert served(router, 20, 4)["c"] in (10, 11)


def test_explain_sees_the_share_as_a_cost() -> None:
    router = router_with(member("s", "stable", 3), member("c", "canary", 1))
    first = router.route(request("a", prefix(1, 4))).decode
    router.release(RequestId("a"))
    second = router.route(request("b", prefix(2, 4))).decode
    assert first.worker_id != second.worker_id or first.worker_id == "s"
    assert any(name == "share" and cost > 0 for candidate in second.candidates for name, cost in candidate.costs)
    assert {candidate.group for candidate in second.candidates} == {"stable", "canary"}


@given(st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 100), min_size=2), st.integers(1, 400))
def test_with_equal_costs_no_group_is_ahead_by_more_than_a_request(weights: dict[str, float], count: int) -> None:
    ahead: dict[str, float] = {}
    chosen: Counter[str] = Counter()
    for _ in range(count):
        group = min(weights, key=lambda name: (ahead.get(name, 0.0), name))
        settle(ahead, weights, group)
        chosen[group] += 1
    assert sum(ahead.values()) == pytest.approx(0, abs=1e-6)
    for group, weight in weights.items():
        share = count * weight / sum(weights.values())
        assert chosen[group] - share == pytest.approx(ahead[group], abs=1e-6)
        assert chosen[group] - share <= 1 + 1e-6


# The reserve


def test_weight_zero_takes_what_no_other_can_take_at_once() -> None:
    router = router_with(member("main", "main"), member("cloud", "cloud", 0))
    assert served(router, 20) == {"main": 20}
    assert served(router, 16, 2, ends=False) == {"main": 16}  # then two steps' tokens wait there
    assert served(router, 16, 3, ends=False) == {"cloud": 16}
    assert set(served(router, 10, 4, ends=False)) == {"main", "cloud"}  # both are saturated: by what it costs
    drained = router_with(replace(member("main", "main"), is_draining=True), member("cloud", "cloud", 0))
    assert served(drained, 3) == {"cloud": 3}
    alone = router_with(member("cloud", "cloud", 0))
    assert served(alone, 3) == {"cloud": 3}


def test_there_is_headroom_as_long_as_the_reserve_has_some() -> None:
    router = router_with(member("main", "main"), member("cloud", "cloud", 0))
    served(router, 20, ends=False)
    assert router.has_headroom(request("x"))
    served(router, 20, 2, ends=False)
    assert not router.has_headroom(request("x"))


# Splits


def split_router(*workers: WorkerFacts) -> Router:
    return router_with(*workers, split=SplitRule(min_uncached_tokens=32, min_uncached_fraction=0))


def test_a_request_is_split_within_its_group_only() -> None:
    router = split_router(
        member("p0", "torch", 1, Role.PREFILL, engine="torch"),
        member("d0", "torch", 1, Role.DECODE, engine="torch"),
        member("v0", "vllm", 1, Role.BOTH, engine="vllm"),
    )
    routes = []
    for number in range(20):
        routes.append(router.route(request(f"r{number}", prefix(number, 8))))
        router.release(RequestId(f"r{number}"))
    placed = Counter((route.prefill.worker_id if route.prefill else None, route.decode.worker_id) for route in routes)
    assert placed == {("p0", "d0"): 10, (None, "v0"): 10}


@pytest.mark.parametrize("change", [{"block_size": 32}, {"engine": "other"}, {"group": "other"}, {"adapters": frozenset({"sql"})}])
def test_kv_goes_only_between_workers_that_agree(change: dict[str, object]) -> None:
    prefill, decode = member("p", "g", None, Role.PREFILL), member("d", "g", None, Role.DECODE)
    assert split_router(prefill, decode).route(request()).prefill is not None
    route = split_router(prefill, replace(decode, **change)).route(request())  # type: ignore[arg-type]
    assert (route.prefill, route.decode.worker_id, route.rule) == (None, "d", "no-prefill-worker")
    assert split_router(prefill, replace(decode, **change)).has_headroom(request())  # type: ignore[arg-type]


# Adapters


def test_only_workers_with_the_adapter_take_its_requests() -> None:
    router = router_with(member("a", "g"), member("b", "g", adapters=frozenset({"sql"})))
    for number in range(6):
        assert router.route(replace(request(f"s{number}"), adapter="sql")).decode.worker_id == "b"
        router.release(RequestId(f"s{number}"))
    assert {router.route(request(f"r{number}", prefix(number, 4))).decode.worker_id for number in range(6)} == {"a", "b"}
    router.remove_worker(WorkerId("b"))
    with pytest.raises(NoWorkers, match="is without the LoRA adapter 'sql'") as caught:
        router.route(replace(request("x"), adapter="sql"))
    assert caught.value.retry_after_s
    assert router.route(request("y")).decode.worker_id == "a"


# Contexts of different lengths


def test_a_worker_with_too_short_a_context_is_left_out() -> None:
    router = router_with(member("long", "g", context_length=4096), member("short", "g", context_length=512))
    for number in range(4):
        assert router.route(request(f"r{number}", prefix(number, 31), output=17)).decode.worker_id == "long"
        router.release(RequestId(f"r{number}"))
    shorter = [router.route(request(f"s{number}", prefix(9 + number, 31), output=16)).decode.worker_id for number in range(2)]
    assert sorted(shorter) == ["long", "short"]
    router.remove_worker(WorkerId("long"))
    with pytest.raises(NoWorkers, match="too short a context"):
        router.route(request("x", prefix(1, 31), output=17))


# Blocks of different sizes


def sized(worker_id: str, block_size: int) -> WorkerFacts:
    return replace(facts(worker_id), block_size=block_size)


def sized_request(request_id: str, tokens: list[int], sizes: tuple[int, ...]) -> RouteRequest:
    first, *others = sizes
    hashes = {size: sequence_hashes(tokens, size) for size in others}
    return RouteRequest(RequestId(request_id), "demo", sequence_hashes(tokens, first), len(tokens), 16, other_hashes=hashes)


def test_a_prefix_is_found_in_blocks_of_any_size() -> None:
    router = Router(RouterSettings(PolicySettings("kv")))
    router.upsert_worker(sized("small", 16))
    router.upsert_worker(sized("large", 64))
    assert list(router.block_sizes("demo")) == [16, 64]
    tokens = list(range(1000))
    router.apply(WorkerId("large"), Epoch(1), [BlocksStored(list(sequence_hashes(tokens, 64)))])
    router.apply(WorkerId("small"), Epoch(1), [BlocksStored(list(sequence_hashes(tokens[:320], 16)))])
    placement = router.route(sized_request("a", tokens, (16, 64))).decode
    assert (placement.worker_id, placement.overlap_block_count, placement.block_size) == ("large", 15, 64)
    costs = {candidate.worker_id: dict(candidate.costs)["uncached"] for candidate in placement.candidates}
    assert costs == {"large": 3 * (1000 - 15 * 64), "small": 3 * (1000 - 320)}
    assert list(router.block_sizes("demo")) == [16, 64]


def test_what_is_on_its_way_counts_in_its_own_blocks() -> None:
    router = Router(RouterSettings(PolicySettings("kv")))
    router.upsert_worker(sized("small", 16))
    router.upsert_worker(sized("large", 64))
    tokens = list(range(640))
    first = router.route(sized_request("a", tokens, (16, 64))).decode
    second = router.route(sized_request("b", tokens, (16, 64))).decode
    assert second.worker_id == first.worker_id  # a burst with one prefix stays together, whichever has got it
    assert second.overlap_block_count == 639 // first.block_size


@given(st.lists(st.tuples(st.sampled_from([4, 8]), st.integers(0, 80)), min_size=1, max_size=6), st.integers(1, 80))
def test_several_matches_are_seen_as_one(holdings: list[tuple[int, int]], token_count: int) -> None:
    tokens = list(range(80))
    index = default_index(10_000)
    sizes = {WorkerId(f"w{number}"): size for number, (size, _) in enumerate(holdings)}
    held = {WorkerId(f"w{number}"): count // size for number, (size, count) in enumerate(holdings)}
    for worker_id, size in sizes.items():
        index.store(worker_id, sequence_hashes(tokens, size)[: held[worker_id]])
    prompt = tokens[:token_count]
    overlaps = OverlapsBySize([(size, index.match(list[SequenceHash](sequence_hashes(prompt, size)))) for size in (4, 8)])
    ids = tuple(sizes)
    wanted = [min(held[worker_id], token_count // sizes[worker_id]) for worker_id in ids]
    assert overlaps.depths(ids) == [overlaps.depth(worker_id) for worker_id in ids] == wanted
    assert overlaps.as_dict() == {worker_id: depth for worker_id, depth in zip(ids, wanted, strict=True) if depth}
    beyond = [token_count - depth * sizes[worker_id] for worker_id, depth in zip(ids, wanted, strict=True)]
    assert list(overlaps.tokens_beyond(ids, 4, token_count)) == beyond
    assert overlaps.level_count == 1
