"""Session affinity: a preference that holds where nothing else speaks, and never against what must not be."""

from __future__ import annotations

import pytest

from polyphase.core.errors import NoWorkers
from polyphase.core.ids import Epoch, RequestId, WorkerId
from polyphase.router import PolicySettings, Router, RouterSettings, SessionRule, SplitRule
from polyphase.router.sessions import Sessions
from polyphase.router.types import Leg
from polyphase.wire.cards import Role
from polyphase.wire.events import Load
from tests.unit.router.builders import facts, prefix, request

E1 = Epoch(1)


def router_with(*names: str, idle_s: float = 600, max_waiting: int = 1024) -> Router:
    router = Router(RouterSettings(sessions=SessionRule(idle_ns=int(idle_s * 1e9)), max_waiting_requests=max_waiting))
    for name in names:
        router.upsert_worker(facts(name))
    return router


def place(router: Router, session: int | None = 7, *, number: int = 0, now_s: float = 0.0, ends: bool = True, blocks: int = 4) -> str:
    """Every request has another prompt, so that only the session can draw it."""
    place.count += 1
    asked = request(f"r{place.count}", prefix(10_000 + place.count, blocks), session=session, now_s=now_s)
    route = router.route(asked)
    if ends:
        router.release(asked.request_id)
    return route.decode.worker_id


place.count = 0


def test_turns_of_a_session_stay_together_and_others_take_turns():
    router = router_with("a", "b", "c", "d")
    assert len({place(router) for _ in range(20)}) == 1
    assert len({place(router, None) for _ in range(4)}) == 4
    assert len({place(router, 100 + n) for n in range(4)}) == 4


def test_a_session_gives_way_when_its_worker_is_overloaded_and_settles_anew():
    router = router_with("a", "b")
    home = place(router)
    other = "b" if home == "a" else "a"
    router.report_load(WorkerId(home), E1, Load(waiting_prefill_tokens=400))
    assert place(router) == home
    router.report_load(WorkerId(home), E1, Load(waiting_prefill_tokens=5000))
    assert place(router) == other
    router.report_load(WorkerId(home), E1, Load())
    assert place(router) == other


def test_a_session_is_never_pinned_to_who_cannot_take_it():
    router = router_with("a", "b", max_waiting=0)
    home = place(router)
    other = "b" if home == "a" else "a"
    router.upsert_worker(facts(home, is_draining=True))
    assert place(router) == other
    router = router_with("a", "b")
    home = place(router)
    other = "b" if home == "a" else "a"
    router.remove_worker(WorkerId(home))
    assert place(router) == other
    router.remove_worker(WorkerId(other))
    with pytest.raises(NoWorkers):
        place(router)


def test_a_full_home_is_left():
    router = router_with(max_waiting=0)
    for name in "ab":
        router.upsert_worker(facts(name, max_running=1))
    home = place(router, ends=False)
    assert place(router, ends=False) != home


def test_a_new_life_of_the_worker_is_no_home():
    router = router_with("a", "b")
    home = place(router)
    other = "b" if home == "a" else "a"
    router.upsert_worker(facts(home, epoch=2))
    router.report_load(WorkerId(home), Epoch(2), Load(waiting_prefill_tokens=1))
    assert place(router) == other


def test_an_idle_session_is_forgotten_after_its_time():
    router = router_with("a", "b", idle_s=60)
    home = place(router, now_s=0)
    router.report_load(WorkerId(home), E1, Load(waiting_prefill_tokens=10))
    assert place(router, now_s=50) == home
    assert place(router, now_s=100) == home  # it was used in between
    assert place(router, now_s=160) != home


def test_both_legs_of_a_split_session_have_their_home():
    router = Router(RouterSettings(split=SplitRule(min_uncached_tokens=1)))
    for name, role in (("p0", Role.PREFILL), ("p1", Role.PREFILL), ("d0", Role.DECODE), ("d1", Role.DECODE)):
        router.upsert_worker(facts(name, role))
    routes = []
    for number in range(10):
        routes.append(router.route(request(f"r{number}", prefix(50 + number, 4), session=3)))
        router.release(RequestId(f"r{number}"))
    assert all(route.prefill is not None for route in routes)
    assert len({(route.decode.worker_id, route.prefill.worker_id) for route in routes if route.prefill}) == 1


def test_memory_is_bounded_and_the_least_recently_used_goes():
    sessions = Sessions(SessionRule(capacity=3))
    w = (WorkerId("w"), E1)
    for number in range(3):
        sessions.note("m", number, w, w, 0)
    sessions.note("m", 0, w, w, 0)
    sessions.note("m", 9, w, w, 0)
    assert len(sessions) == 3
    assert [sessions.home("m", number, Leg.BOTH, 0) for number in (0, 1, 2, 9)] == [w, None, w, w]
    assert sessions.home("another", 0, Leg.BOTH, 0) is None


def test_time_that_runs_backwards_forgets_nothing_and_revives_nothing():
    sessions = Sessions(SessionRule(idle_ns=10))
    w = (WorkerId("w"), E1)
    sessions.note("m", 1, w, w, 100)
    assert sessions.home("m", 1, Leg.BOTH, 50) == w
    assert sessions.home("m", 1, Leg.BOTH, 110) is None
    assert sessions.home("m", 1, Leg.BOTH, 50) is None


def test_without_the_part_sessions_draw_nothing():
    router = Router(RouterSettings(PolicySettings(weights={"session": 0})))
    for name in "abc":
        router.upsert_worker(facts(name))
    assert len({place(router) for _ in range(3)}) == 3
