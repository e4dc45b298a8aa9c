"""Split only where it pays: the sum of both ways in milliseconds, from measured paces, queues and those who would be held up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polyphase.core.ids import Epoch, RequestId, WorkerId
from polyphase.router import Router, RouterSettings, SplitRule, WorkerFacts
from polyphase.router.pace import Paces
from polyphase.router.split import Side, reason_of, worth_of_split
from polyphase.router.types import RouteRequest, WorkerView
from polyphase.wire.cards import Role
from polyphase.wire.events import Load

D, D2, P = WorkerId("decode-0"), WorkerId("decode-1"), WorkerId("prefill-0")


def facts(worker_id: WorkerId, role: Role) -> WorkerFacts:
    return WorkerFacts(worker_id, Epoch(1), "m", role, 16, 4096, 512, 64, can_hand_over=True)


def view(worker_id: WorkerId, *, running: int = 0, queued: int = 0) -> WorkerView:
    role = Role.PREFILL if worker_id == P else Role.DECODE
    return WorkerView(facts(worker_id, role), Load(running_count=running, waiting_prefill_tokens=queued), 0, 0, 0, 0)


def known_paces() -> Paces:
    """0.5 ms a token to compute, 0.01 to move, 20 ms to hand over."""
    paces = Paces()
    for worker_id in (D, P):
        paces.note_prefill(worker_id, 1000, 500)
    paces.note_transfer(P, D, 1000, 10, 20)
    return paces


def test_nothing_is_weighed_before_all_was_measured() -> None:
    sides = Side(view(D), 1000), Side(view(P), 1000)
    paces = Paces()
    assert worth_of_split(*sides, view(D), 1000, paces) is None
    paces.note_prefill(D, 1000, 500)
    assert worth_of_split(*sides, view(D), 1000, paces) is None
    paces.note_transfer(P, D, 1000, 10, 20)
    assert worth_of_split(*sides, view(D), 1000, paces) is not None, "what is not known of the prefill worker is taken from the others"
    assert "split: 1000 of 1200 prompt tokens" in reason_of(None, *sides, 1200)


@pytest.mark.parametrize(
    ("running", "queued_whole", "queued_prefill", "uncached_prefill", "does_pay"),
    [
        (0, 0, 0, 1000, False),  # nobody is held up, and moving costs 30 ms
        (1, 0, 0, 1000, True),  # one is held up for 500 ms
        (0, 1000, 0, 1000, True),  # the decode worker has a queue
        (0, 0, 2000, 1000, False),
        (1, 0, 2000, 1000, False),  # 1,500 ms there against 1,000 here
        (4, 0, 2000, 1000, True),
        (0, 0, 0, 100, True),  # it is cached at the prefill worker
    ],
)
def test_both_ways_are_summed_up(running: int, queued_whole: int, queued_prefill: int, uncached_prefill: int, does_pay: bool) -> None:
    whole = Side(view(D, running=running, queued=queued_whole), 1000)
    prefill = Side(view(P, queued=queued_prefill), uncached_prefill)
    worth = worth_of_split(whole, prefill, view(D), 1000, known_paces())
    assert worth is not None
    assert worth.whole_ms == pytest.approx(0.5 * (queued_whole + 1000))
    assert worth.held_up_ms == pytest.approx(500 * running)
    assert worth.split_ms == pytest.approx(0.5 * (queued_prefill + uncached_prefill))
    assert worth.moving_ms == pytest.approx(30)
    assert worth.does_pay is does_pay
    reason = reason_of(worth, whole, prefill, 1000)
    assert reason.startswith("split: " if does_pay else "whole: ")
    assert "ms to hand over" in reason
    assert ("nobody" in reason) is (running == 0)


def test_a_slow_way_is_avoided_for_that_pair_only() -> None:
    paces = known_paces()
    for _ in range(30):
        paces.note_transfer(P, D2, 1000, 5000, 20)
    whole, prefill = Side(view(D, running=3), 1000), Side(view(P), 1000)
    near, far = (worth_of_split(whole, prefill, view(taker), 1000, paces) for taker in (D, D2))
    assert near is not None
    assert far is not None
    assert near.does_pay
    assert not far.does_pay
    paces.drop_worker(D2)
    after = worth_of_split(whole, prefill, view(D2), 1000, paces)
    assert after is not None
    assert after.moving_ms < far.moving_ms


def test_small_figures_teach_nothing() -> None:
    paces = Paces()
    paces.note_prefill(D, 10, 50)
    paces.note_prefill(D, 100, -1)
    paces.note_transfer(P, D, 10, 50, 1)
    assert paces.prefill_ms_per_token(D) is None
    assert paces.transfer_ms_per_token(P, D) is None
    assert paces.hand_over_ms is None


def router(**rule: object) -> Router:
    made = Router(RouterSettings(split=SplitRule(**rule)))  # type: ignore[arg-type]
    made.upsert_worker(facts(P, Role.PREFILL))
    made.upsert_worker(facts(D, Role.DECODE))
    return made


def request(number: int, prompt_tokens: int = 1000) -> RouteRequest:
    return RouteRequest(RequestId(f"r{number}"), "m", [], prompt_tokens, 100)


def test_the_router_splits_until_it_knows_and_then_where_it_pays_and_books_what_it_says() -> None:
    made = router(is_weighed=True)
    first = made.route(request(0))
    assert (first.rule, first.prefill is not None) == ("split", True)
    made.release(RequestId("r0"))
    made.paces = known_paces()
    idle = made.route(request(1))
    assert (idle.rule, idle.prefill) == ("does-not-pay", None)
    assert "hold up nobody" in idle.reason
    assert made.bookings.of(P).is_zero()
    assert made.bookings.of(D).prefill_tokens == 1000
    busy = made.route(request(2))  # the first one's booking is load already: no report was needed
    assert (busy.rule, busy.prefill is not None) == ("split", True)
    assert made.bookings.of(P).prefill_tokens == 1000
    made.report_load(D, Epoch(1), Load(running_count=8))
    assert made.route(request(3, prompt_tokens=200)).rule == "short-prompt"
    for number in range(4):
        made.release(RequestId(f"r{number}"))
    assert made.bookings.total().is_zero()


def test_a_threshold_that_was_given_is_not_weighed() -> None:
    made = router(min_uncached_tokens=64)
    made.paces = known_paces()
    assert made.route(request(0)).rule == "split"
    assert made.route(replace(request(1), prompt_token_count=63)).rule == "short-prompt"
