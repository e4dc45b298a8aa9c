"""What another worker holds is pulled where that is faster, by what was measured; the deepest holder, and of equals the least asked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polyphase.core.ids import Epoch, RequestId, WorkerId
from polyphase.router import PullRule, Router, RouterSettings, SplitRule, reason_of_pull
from polyphase.router.pace import PULL_MEMORY_NS, Paces
from polyphase.router.pull import QUESTION_MS, PullsUnderWay, choose_pull
from polyphase.router.types import PolicySettings, Pull
from polyphase.wire.cards import Role
from tests.unit.router.builders import BLOCK_SIZE, facts, prefix, request

RULE = PullRule(is_on=True, min_tokens=64)
A, B, C = (WorkerId(name) for name in "abc")


def paces_with(compute: float, pull: float | None = None) -> Paces:
    """Milliseconds per token, of worker c and of pulls from a and b to it."""
    paces = Paces()
    paces.note_prefill(C, 1000, 1000 * compute)
    for source in (A, B):
        for _ in range(2 if pull is not None else 0):  # the first is the meeting
            paces.note_pull(source, C, 1000, 1000 * (pull or 0.0), 0)
    return paces


def pull_of(paces: Paces, held: int = 0, under_way: PullsUnderWay | None = None, now_ns: int = 0, **tokens: int) -> Pull | None:
    holders = [(facts(name), count) for name, count in tokens.items()]
    return choose_pull(RULE, facts("c"), held, holders, paces, under_way or PullsUnderWay(), now_ns)


def test_what_was_not_measured_is_tried() -> None:
    for paces in (Paces(), paces_with(0.5)):
        pull = pull_of(paces, a=640)
        assert pull is not None
        assert (pull.holder, pull.epoch, pull.token_count, pull.saved_token_count, pull.is_wanted) == (A, 1, 640, 640, True)
        assert "not known yet" in reason_of_pull(pull, C)


@pytest.mark.parametrize(("compute", "pull", "is_wanted"), [(0.5, 0.01, True), (0.01, 0.5, False), (0.1, 0.1, False)])
def test_the_faster_way_is_taken(compute: float, pull: float, is_wanted: bool) -> None:
    found = pull_of(paces_with(compute, pull), held=160, a=800)
    assert found is not None
    assert found.saved_token_count == 640
    assert found.compute_ms == pytest.approx(640 * compute)
    assert found.pull_ms == pytest.approx(QUESTION_MS + 640 * pull)
    assert found.is_wanted is is_wanted
    reason = reason_of_pull(found, C)
    assert ("should take" if is_wanted else "would take") in reason
    assert f"{found.pull_ms:.0f} ms, computing them {found.compute_ms:.0f} ms" in reason


def test_few_tokens_are_not_worth_a_question() -> None:
    assert pull_of(paces_with(0.5, 0.01), held=100, a=163) is None
    assert pull_of(paces_with(0.5, 0.01), held=100, a=164) is not None


def test_the_deepest_holder_is_asked_and_of_equals_the_one_that_is_asked_least() -> None:
    under_way = PullsUnderWay()
    under_way.begin(RequestId("r"), A)
    for paces in (Paces(), paces_with(0.5), paces_with(0.5, 0.01)):
        assert pull_of(paces, a=640, b=800).holder == B  # type: ignore[union-attr]
        assert pull_of(paces, under_way=under_way, a=640, b=640).holder == B  # type: ignore[union-attr]
    under_way.end(RequestId("r"))
    assert pull_of(Paces(), under_way=under_way, a=640, b=640).holder == A  # type: ignore[union-attr]


def test_pulls_from_one_holder_share_what_it_can_give() -> None:
    paces, under_way = paces_with(0.5, 0.2), PullsUnderWay()
    wanted = []
    for number in range(4):
        found = pull_of(paces, under_way=under_way, a=640)
        assert found is not None
        wanted.append(found.is_wanted)
        under_way.begin(RequestId(str(number)), A)
    assert wanted == [True, True, False, False]
    for number in range(4):
        under_way.end(RequestId(str(number)))
        under_way.end(RequestId(str(number)))
    assert (under_way.count(A), len(under_way)) == (0, 0)


def test_a_way_that_did_not_pay_is_tried_again_after_a_while() -> None:
    paces = paces_with(0.1, 5.0)
    assert pull_of(paces, a=640).is_wanted is False  # type: ignore[union-attr]
    assert pull_of(paces, now_ns=PULL_MEMORY_NS, a=640).is_wanted  # type: ignore[union-attr]
    paces.note_pull(A, C, 1000, 50, PULL_MEMORY_NS)
    assert paces.pull_ms_per_token(A, C, PULL_MEMORY_NS) is None, "they met again"
    paces.note_pull(A, C, 1000, 10, PULL_MEMORY_NS + 1)
    assert paces.pull_ms_per_token(A, C, PULL_MEMORY_NS + 1) == pytest.approx(0.01)
    assert paces.pull_ms_per_token(B, C, PULL_MEMORY_NS + 1) is None, "one measured figure of another pair says nothing yet"
    paces.note_pull(A, C, 1000, 10, PULL_MEMORY_NS + 2)
    assert paces.pull_ms_per_token(B, C, PULL_MEMORY_NS + 2) == pytest.approx(0.01), "taken to be like the others"
    paces.drop_worker(A)
    paces.note_pull(A, C, 10, 99, PULL_MEMORY_NS + 3)  # too few tokens to say anything
    assert paces._pull.keys() == {(B, C)}


def test_workers_that_cannot_read_each_other_s_blocks_give_up_soon() -> None:
    """Two engines of one model whose blocks differ: the index says that the prefix is there, and it is, in a form of no use."""
    paces = paces_with(0.5)
    for _ in range(2):
        paces.note_pull(A, C, 0, 20, 0)
        assert pull_of(paces, a=640) is not None
    paces.note_pull(A, C, 0, 20, 0)
    assert pull_of(paces, a=640) is None
    assert pull_of(paces, a=640, b=320).holder == B  # type: ignore[union-attr]
    assert pull_of(paces, a=640, now_ns=PULL_MEMORY_NS) is not None
    paces.note_pull(A, C, 0, 20, PULL_MEMORY_NS)
    assert pull_of(paces, a=640, now_ns=PULL_MEMORY_NS) is None, "once is enough now"
    paces.note_pull(A, C, 16, 20, PULL_MEMORY_NS)
    assert pull_of(paces, a=640, now_ns=PULL_MEMORY_NS) is not None


# In the router


def router(*workers: str, policy: str = "round-robin", pull: PullRule = RULE, prefill: str | None = None) -> Router:
    made = Router(RouterSettings(PolicySettings(policy), SplitRule(min_uncached_tokens=256), pull=pull))
    for name in workers:
        made.upsert_worker(facts(name, Role.DECODE if prefill else Role.BOTH))
    if prefill:
        made.upsert_worker(facts(prefill, Role.PREFILL))
    return made


HASHES = prefix(1, 64)


def test_a_route_names_the_holder_and_books_what_remains() -> None:
    made = router("a", "b")
    made.add_blocks(A, Epoch(1), HASHES[:60])
    routes = [made.route(request(name, HASHES)) for name in ("1", "2")]
    by_worker = {route.decode.worker_id: route for route in routes}
    pull = by_worker[B].pull
    assert pull is not None
    assert (pull.holder, pull.token_count, pull.saved_token_count) == (A, 960, 960)
    assert by_worker[A].pull is None
    booked = {view.facts.worker_id: view.booked_prefill_tokens for view in made.workers()}
    assert booked == {A: 64, B: 64}
    for route in routes:
        made.release(route.request_id)
    assert len(made._pulls) == 0


@pytest.mark.parametrize("change", ["off", "stalled", "excluded", "no-export", "gone", "draining"])
def test_who_may_be_asked(change: str) -> None:
    made = router("a", "b", pull=PullRule(is_on=change != "off", min_tokens=64))
    if change == "no-export":
        made.upsert_worker(facts("a", epoch=2, can_hand_over=False))
    made.add_blocks(A, Epoch(2 if change == "no-export" else 1), HASHES)
    if change == "stalled":
        made.set_stalled(A, True)
    if change == "gone":
        made.remove_worker(A)
    if change == "draining":
        made.upsert_worker(replace(facts("a"), is_draining=True))
    for name in ("1", "2"):
        route = made.route(request(name, HASHES, excluded=("a",) if change == "excluded" else ()))
        if route.decode.worker_id == B:
            assert (route.pull is not None) is (change == "draining")
            return
    raise AssertionError("never routed to b")


def test_what_can_be_pulled_is_no_reason_to_split() -> None:
    """The decode worker has next to nothing to compute then."""
    made = router("a", "b", policy="least-loaded", prefill="p")
    made.add_blocks(A, Epoch(1), HASHES[:62])
    made.route(request("busy", prefix(2, 200), tokens=250))  # books a or b
    chosen = {}
    for name in ("1", "2", "3"):
        route = made.route(request(name, HASHES))
        chosen.setdefault(route.decode.worker_id, route)
    route = chosen[B]
    assert route.prefill is None
    assert route.rule == "short-prompt"
    assert route.pull is not None
    assert route.pull.holder == A


def test_a_prefill_worker_pulls_from_a_decode_worker() -> None:
    """Both need it, but one of them computes the prompt: what is far enough from cached is split as before."""
    made = router("a", "b", prefill="p")
    made.add_blocks(A, Epoch(1), HASHES[:20])
    routes = [made.route(request(name, HASHES)) for name in ("1", "2")]
    route = next(route for route in routes if route.prefill is not None)
    assert route.prefill is not None
    assert route.prefill.worker_id == "p"
    assert route.pull is not None
    assert (route.pull.holder, route.pull.saved_token_count) == (A, 20 * BLOCK_SIZE)
    assert len(made._pulls) == len([route for route in routes if route.pull is not None])
    for route in routes:
        made.mark_prefill_done(route.request_id)
    assert len(made._pulls) == 0
