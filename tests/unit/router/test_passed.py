"""Requests that are passed through go to workers that take their kinds, by load, and are never split."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polyphase.core.errors import NoWorkers
from polyphase.router import Router, RouterSettings, SplitRule
from polyphase.wire.cards import Role
from tests.unit.router.builders import facts, request

IMAGES = frozenset({"chat", "images"})


def router_of(passes: dict[str, frozenset[str]], roles: dict[str, Role] | None = None) -> Router:
    router = Router(RouterSettings(split=SplitRule(min_uncached_tokens=1)))
    for name, kinds in passes.items():
        router.upsert_worker(replace(facts(name, (roles or {}).get(name, Role.BOTH)), passes=kinds))
    return router


def test_only_who_takes_all_its_kinds() -> None:
    router = router_of({"a": frozenset({"chat"}), "b": IMAGES, "c": frozenset({"images"})})
    for number in range(6):
        route = router.route(replace(request(f"r{number}", []), needs=IMAGES))
        assert route.decode.worker_id == "b"
        assert (route.rule, route.reason) == ("passed-through", "passed through: chat, images")
    assert {router.route(request(f"t{number}", [])).decode.worker_id for number in range(4)} == {"a", "c"}, "tokens go by load as ever"


def test_by_load_among_them() -> None:
    router = router_of({"a": IMAGES, "b": IMAGES})
    chosen = [router.route(replace(request(f"r{number}", []), needs=IMAGES)).decode.worker_id for number in range(6)]
    assert sorted(chosen) == ["a", "a", "a", "b", "b", "b"]


def test_it_is_not_split_and_needs_no_prefill_worker() -> None:
    router = router_of({"p": frozenset(), "d": IMAGES}, {"p": Role.PREFILL, "d": Role.DECODE})
    wanted = replace(request("r", [], tokens=4000), needs=IMAGES)
    assert not router.waits_for_prefill(wanted)
    assert router.has_headroom(wanted)
    route = router.route(wanted)
    assert (route.prefill, route.decode.worker_id) == (None, "d")
    assert router.route(request("s")).prefill is not None


def test_a_prefill_worker_takes_it_if_nobody_else_does() -> None:
    router = router_of({"p": IMAGES, "d": frozenset()}, {"p": Role.PREFILL, "d": Role.DECODE})
    assert router.route(replace(request("r", []), needs=IMAGES)).decode.worker_id == "p"


def test_nobody() -> None:
    router = router_of({"a": frozenset({"chat"})})
    with pytest.raises(NoWorkers, match="passes on chat, images"):
        router.route(replace(request("r", []), needs=IMAGES))


def test_a_guess_of_its_size_keeps_no_worker_out() -> None:
    router = Router(RouterSettings())
    router.upsert_worker(replace(facts("a"), passes=IMAGES, context_length=100))
    assert router.route(replace(request("r", [], tokens=4000), needs=IMAGES)).decode.worker_id == "a"
