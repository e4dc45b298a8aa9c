"""Who can take whose KV: known from the workers' cards, before the first request; where nobody can, requests are served whole."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polyphase.router import WorkerFacts, misfits
from polyphase.router.pull import may_pull
from polyphase.wire.cards import BLOCKS, Role
from tests.unit.router.builders import facts, prefix, request, router_with

NIXL, OTHER = "vllm-nixl/1", "vllm-nixl/2"


def test_a_prompt_goes_where_somebody_takes_its_kv() -> None:
    router = router_with(
        facts("p-a", Role.PREFILL, offer_kind=NIXL),
        facts("p-b", Role.PREFILL),
        facts("d-a", Role.DECODE, offer_kind=NIXL),
        facts("d-b", Role.DECODE),
        facts("d-c", Role.DECODE, offer_kind=OTHER),
    )
    pairs = set()
    for number in range(30):
        route = router.route(request(str(number), prefix(number, 64)))
        if route.prefill is not None:
            pairs.add((str(route.prefill.worker_id), str(route.decode.worker_id)))
    assert pairs == {("p-a", "d-a"), ("p-b", "d-b")}


def test_where_no_pair_fits_requests_are_served_whole() -> None:
    router = router_with(facts("p", Role.PREFILL, offer_kind=NIXL), facts("d", Role.DECODE))
    route = router.route(request())
    assert (route.prefill, route.decode.worker_id, route.rule) == (None, "d", "no-prefill-worker")
    assert "that can hand over to one that decodes" in route.reason


def test_a_taker_that_is_full_is_not_waited_for() -> None:
    router = router_with(
        facts("p", Role.PREFILL, offer_kind=NIXL),
        facts("d", Role.DECODE, offer_kind=NIXL, max_running=1),
        facts("e", Role.DECODE, offer_kind=OTHER),
        max_waiting_requests=0,
    )
    routes = [router.route(request(str(number), prefix(number, 64))) for number in range(2)]
    assert {(route.rule, str(route.decode.worker_id)) for route in routes} == {("split", "d"), ("no-prefill-worker", "e")}


@pytest.mark.parametrize(
    ("giver", "taker", "said"),
    [
        (facts("p", Role.PREFILL), facts("d", Role.DECODE), None),
        (facts("p", Role.PREFILL, can_hand_over=False), facts("d", Role.DECODE), "p cannot hand its KV over: decode workers compute"),
        (facts("p", Role.PREFILL, can_hand_over=False), facts("q", Role.PREFILL), None),
        (
            facts("p", Role.PREFILL, offer_kind=NIXL, offer_facts={"version": "0.32.0", "dtype": "bfloat16"}),
            facts("d", Role.DECODE, offer_kind=OTHER, offer_facts={"version": "0.32.0", "dtype": "float16"}),
            "p cannot hand over to d: dtype is bfloat16 at the one and float16 at the other",
        ),
        (
            facts("p", Role.PREFILL, offer_kind=NIXL),
            facts("d", Role.DECODE, offer_kind=BLOCKS),
            "the one hands over vllm-nixl, the other takes blocks of our own",
        ),
        (facts("p", Role.PREFILL), facts("d", offer_kind=""), "the one hands over blocks of our own, the other takes nothing"),
    ],
)
def test_what_does_not_fit_is_named(giver: WorkerFacts, taker: WorkerFacts, said: str | None) -> None:
    found = misfits([taker, giver])
    assert (len(found) == 1 and said in found[0]) if said else not found


def test_blocks_of_stock_engines_are_not_pulled_from_their_caches() -> None:
    """They bring KV to each other only as an offer."""
    one, other = (facts(name, offer_kind=NIXL) for name in ("a", "b"))
    assert not may_pull(one, other)
    assert may_pull(facts("a"), facts("b"))
    assert not may_pull(facts("a"), replace(facts("b"), is_asleep=True))
