"""What users report of other routers, and must not happen here: one worker pinned by a system prompt, herds, overload in bursts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from polyphase.engines.mock import MockSettings
from polyphase.launch.model_source import resolve_model
from polyphase.router import PolicySettings, Route, Router, RouteRequest, RouterSettings
from polyphase.twin import ChatShape, Conversation, Fleet, FleetSettings, Timeline, burst_load, chat_load, simulate
from polyphase.twin.fleet import router_of
from polyphase.worker.room import QueueLimits

BATCH_TOKENS = 2048
ENGINE = MockSettings(resolve_model("demo").location, shape="llama-3.1-8b", max_batch_tokens=BATCH_TOKENS, max_running=64)
LIMITS = QueueLimits.of_engine(BATCH_TOKENS, 10_000, 10_000_000)
# Nearly all of each prompt is the same; without it in the cache a worker computes about 9 a second, with it about 60.
SYSTEM_PROMPT = ChatShape(system_tokens=4096, message_tokens=500, answer_tokens=60, turn_count=1, think_s=1)


def questions(count: int, per_s: float, seed: int = 0) -> list[Conversation]:
    """Single requests under one system prompt."""
    return chat_load(count, per_s, lambda prompt, wanted: [1] * wanted, 16, seed, replace(SYSTEM_PROMPT, turn_count=0))


def play(fleet: FleetSettings, load: list[Conversation]) -> Fleet:
    run = Fleet(fleet, router_of("kv"), load)
    while run.advance():
        pass
    return run


def share_of_each(run: Fleet) -> list[float]:
    served = Counter(record.worker_id for record in run.records)
    return sorted((served[name] / len(run.records) for name in run.workers), reverse=True)


def test_a_hot_prefix_spreads_to_as_many_workers_as_it_needs() -> None:
    """At five times what one worker can serve, it has to be on several, each of which computes it only a few times."""
    run = play(FleetSettings(ENGINE, worker_count=8), questions(900, per_s=150.0))
    holders = [name for name, worker in run.workers.items() if worker.machine.core.load().cached_prompt_tokens_total > 0]
    assert len(holders) >= 4
    assert share_of_each(run)[0] < 0.35
    found = run.measures()
    assert found.hit_rate > 0.8, "and still nearly everybody finds it"
    assert found.ttft_p99_s < 1.5


def test_a_cool_prefix_stays_where_it_is() -> None:
    """At a rate that one worker serves with ease, nothing is gained by computing it elsewhere."""
    run = play(FleetSettings(ENGINE, worker_count=8), questions(60, per_s=3.0))
    assert sum(share > 0 for share in share_of_each(run)) <= 2
    assert run.measures().hit_rate > 0.8


def test_a_system_prompt_shared_by_all_pins_nobody() -> None:
    """Source of the trap: with an overlap credit and no regard for load, every request went to the first worker that had it."""
    run = play(FleetSettings(ENGINE, worker_count=8), questions(900, per_s=500.0, seed=1))
    assert share_of_each(run)[0] < 0.25
    assert share_of_each(run)[-1] > 0.03, "all take part"


def test_a_burst_under_one_prompt_computes_it_once_for_each_worker_it_needs() -> None:
    """A request that was routed and is not computed yet counts as cached there, and the engine does not compute it twice at a time."""
    shape = replace(SYSTEM_PROMPT, message_tokens=60, answer_tokens=5)
    load = [one for one in burst_load(1, 24, 1.0, 16, 3, shape) if one.turns[0].token_count > 4096]
    assert len(load) > 8
    run = play(FleetSettings(ENGINE, worker_count=8), load)
    computed = sum(record.cached_token_count < 4096 for record in run.records)
    assert computed == len({record.worker_id for record in run.records}) < 4


def test_several_routers_do_not_herd() -> None:
    """Each of four frontends sees an idle fleet; the workers know better, and say so in their first answer."""
    shape = replace(SYSTEM_PROMPT, system_tokens=2000)
    load = burst_load(10, 32, 6.0, 16, 5, shape)
    fleet = FleetSettings(ENGINE, worker_count=8, frontend_count=4, queue_limits=LIMITS)
    herds = router_in_step
    apart, blind = simulate(fleet, herds, load), simulate(replace(fleet, queue_limits=None), herds, load)
    assert apart.worst_overload_tokens < 0.8 * blind.worst_overload_tokens
    assert apart.overload_tokens < 0.8 * blind.overload_tokens
    assert apart.ttft_p99_s < blind.ttft_p99_s
    assert apart.refused_count == 0, "a refusal is another choice, not the end"


def router_in_step(timeline: Timeline) -> Router:
    """All begin their turns at the same worker, as they would at the worst."""
    return Router(RouterSettings(max_waiting_requests=1_000_000))


def test_what_was_believed_travels_with_the_request() -> None:
    class Counting(Router):
        believed: list[int | None]

        def route(self, request: RouteRequest) -> Route:
            found = super().route(request)
            self.believed.append(found.decode.queued_prefill_tokens)
            return found

    def make(policy: str) -> Counting:
        made = Counting(RouterSettings(PolicySettings(policy)))
        made.believed = []
        return made

    load = burst_load(1, 6, 1.0, 16, 5, SYSTEM_PROMPT)
    for policy, knows in (("kv", True), ("least-loaded", True), ("round-robin", False)):
        router = make(policy)
        simulate(FleetSettings(ENGINE, worker_count=1, queue_limits=LIMITS), lambda timeline, router=router: router, load)  # type: ignore[misc]
        assert router.believed[0] == (0 if knows else None)
        assert (router.believed[-1] or 0) > 0 or not knows
