"""Requests for structured output go to workers that have it, and what has begun to those that can go on with it."""

from __future__ import annotations

import pytest

from polyphase.core.errors import NoWorkers
from polyphase.router import Route, Router, SplitRule, WorkerFacts
from polyphase.wire.cards import Role
from tests.unit.router.builders import facts, prefix, request, router_with

FREELY = SplitRule(min_uncached_tokens=1, min_uncached_fraction=0.0)


def able(name: str, role: Role = Role.BOTH, *, resumes: bool = True) -> WorkerFacts:
    return facts(name, role, takes_grammars=True, resumes_grammars=resumes)


def routed(router: Router, *, is_begun: bool = False, name: int = 1) -> Route:
    return router.route(request(f"r{name}", prefix(name, 64), has_grammar=True, is_begun=is_begun))


def test_others_are_not_asked():
    router = router_with(facts("a"), able("b"), facts("c"))
    assert {routed(router, name=i).decode.worker_id for i in range(6)} == {"b"}
    free = {router.route(request(f"free{i}", prefix(100 + i, 4))).decode.worker_id for i in range(12)}
    assert free > {"a", "c"} or free == {"a", "c"}, "what lasts is remembered for ordinary requests only"


def test_nobody_has_it():
    router = router_with(facts("a"), facts("b"))
    with pytest.raises(NoWorkers, match="each of the 2 workers of the model 'demo' has no structured output"):
        routed(router)
    with pytest.raises(NoWorkers):
        router.has_headroom(request(has_grammar=True))
    assert router.has_headroom(request())


def test_what_has_begun_goes_to_one_that_can_go_on():
    router = router_with(able("forgetful", resumes=False), able("other"))
    assert {routed(router, is_begun=True, name=i).decode.worker_id for i in range(4)} == {"other"}
    assert {routed(router, name=10 + i).decode.worker_id for i in range(12)} == {"forgetful", "other"}
    router.remove_worker(facts("other").worker_id)
    with pytest.raises(NoWorkers, match="cannot go on with structured output that has begun elsewhere"):
        routed(router, is_begun=True)


def test_a_split_needs_a_decode_worker_that_can_go_on():
    forgetful = [able("p", Role.PREFILL), able("d", Role.DECODE, resumes=False)]
    route = routed(router_with(*forgetful, split=FREELY))
    assert (route.prefill, route.decode.worker_id) == (None, "d")
    route = routed(router_with(*forgetful, able("e", Role.DECODE), split=FREELY))
    assert route.prefill is not None
    assert (route.prefill.worker_id, route.decode.worker_id) == ("p", "e")


def test_a_prefill_worker_without_it_is_left_out():
    """It would sample the first token freely."""
    route = routed(router_with(facts("p", Role.PREFILL), able("d", Role.DECODE), split=FREELY))
    assert (route.prefill, route.decode.worker_id) == (None, "d")


def test_a_prefill_worker_serves_it_whole_if_no_other_has_it():
    route = routed(router_with(able("p", Role.PREFILL), facts("d", Role.DECODE), split=FREELY))
    assert (route.prefill, route.decode.worker_id) == (None, "p")
