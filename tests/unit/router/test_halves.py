"""Engines that compute prompts or generate, and never do both: whatever the prompt, it takes two workers."""

from __future__ import annotations

import pytest

from polyphase.core.errors import NoWorkers, Overloaded
from polyphase.router import Router, WorkerFacts, can_serve
from polyphase.wire.cards import Role
from tests.unit.router.builders import facts, prefix, request, router_with

KIND = "sglang/1"


def half(worker_id: str, role: Role, max_running: int = 64) -> WorkerFacts:
    can_hand_over = role is Role.PREFILL
    return facts(worker_id, role, offer_kind=KIND, can_hand_over=can_hand_over, serves_whole=False, max_running=max_running)


def pair() -> Router:
    return router_with(half("p", Role.PREFILL), half("d", Role.DECODE))


def legs(router: Router, request_id: str = "a", block_count: int = 1) -> tuple[str | None, str]:
    route = router.route(request(request_id, prefix(1, block_count)))
    return (None if route.prefill is None else str(route.prefill.worker_id), str(route.decode.worker_id))


def test_even_the_shortest_prompt_is_split() -> None:
    router = pair()
    route = router.route(request("a", prefix(1, 1)))
    assert (route.prefill is not None, route.rule) == (True, "split")
    assert "never do both" in route.reason
    assert legs(router, "b", 64) == ("p", "d")


@pytest.mark.parametrize("missing", ["p", "d"])
def test_one_half_serves_nobody(missing: str) -> None:
    router = router_with(*(half(name, role) for name, role in (("p", Role.PREFILL), ("d", Role.DECODE)) if name != missing))
    for ask in (router.route, router.has_headroom):
        with pytest.raises(NoWorkers):
            ask(request())


def test_a_pair_that_is_full_refuses() -> None:
    router = router_with(half("p", Role.PREFILL), half("d", Role.DECODE, max_running=1), max_waiting_requests=0)
    legs(router)
    with pytest.raises(Overloaded):
        router.route(request("b"))


def test_it_has_room_where_both_have() -> None:
    router = pair()
    assert router.has_headroom(request())
    assert router.waits_for_prefill(request("a", prefix(1, 1))), "each of them needs a prefill worker"


def test_halves_beside_whole_ones_are_no_place_for_whole_requests() -> None:
    router = router_with(half("p", Role.PREFILL), half("d", Role.DECODE), facts("w"))
    found = {legs(router, str(number)) for number in range(6)}
    assert found == {(None, "w")}, "short prompts are not split where somebody serves them whole"


def test_what_can_serve() -> None:
    prefill, decode = half("p", Role.PREFILL), half("d", Role.DECODE)
    assert can_serve([prefill, decode])
    assert not can_serve([prefill])
    assert not can_serve([decode])
    assert can_serve([facts("p", Role.PREFILL)])
    assert not can_serve([])
