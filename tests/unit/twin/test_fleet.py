"""The twin: one seed, one outcome; nothing is lost; routers that see the cache do better than those that do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polyphase.core.errors import ConfigurationError
from polyphase.engines.mock import MockSettings
from polyphase.engines.mock.assembly import assemble_mock
from polyphase.launch.model_source import resolve_model
from polyphase.twin import Conversation, Fleet, FleetSettings, Timeline, burst_load, chat_load, mooncake_load, simulate
from polyphase.twin.fleet import router_of
from polyphase.twin.load import ChatShape

SHAPE = ChatShape(system_tokens=256, message_tokens=200, answer_tokens=20, turn_count=4, think_s=2)


def fleet(workers: int = 4, frontends: int = 1) -> FleetSettings:
    engine = MockSettings(resolve_model("demo").location, max_running=256)
    return FleetSettings(engine, worker_count=workers, frontend_count=frontends)


def chats(count: int = 30) -> list[Conversation]:
    tokens = assemble_mock(fleet().engine, is_shared=False).tokens
    return chat_load(count, 10.0, lambda prompt, wanted: tokens.answer(prompt, wanted, 16), 16, seed=3, shape=SHAPE)


def test_things_happen_in_order() -> None:
    timeline, seen = Timeline(), list[tuple[str, int]]()
    timeline.at(20, lambda: seen.append(("c", timeline.now_ns())))
    timeline.at(10, lambda: seen.append(("a", timeline.now_ns())))
    timeline.at(10, lambda: timeline.at(0, lambda: seen.append(("late", timeline.now_ns()))))
    timeline.at(10, lambda: timeline.after(5, lambda: seen.append(("b", timeline.now_ns()))))
    while timeline.step():
        pass
    assert seen == [("a", 10), ("late", 10), ("b", 15), ("c", 20)]


def test_every_request_ends_and_everything_is_given_back() -> None:
    run = Fleet(fleet(), router_of("kv"), chats())
    while run.advance():
        pass
    assert run.done_count == run.request_count == len(run.records)
    assert all(record.ended_ns and record.first_token_ns and record.refused is None for record in run.records)
    for worker in run.workers.values():
        worker.machine.core.pool.check_invariants()
        assert worker.machine.core.pool.used_count == 0


def test_one_seed_one_outcome() -> None:
    assert simulate(fleet(), router_of("kv"), chats()) == simulate(fleet(), router_of("kv"), chats())


def test_a_router_that_sees_the_cache_hits_it() -> None:
    done: list[int] = []
    ours = simulate(fleet(), router_of("kv"), chats(), lambda finished, whole: done.append(finished))
    blind = simulate(fleet(), router_of("round-robin"), chats())
    assert ours.hit_rate > 1.2 * blind.hit_rate
    assert ours.ttft_mean_s < blind.ttft_mean_s
    assert done == sorted(set(done))
    assert done[-1] == ours.request_count


def test_a_second_turn_finds_the_answer_of_the_first() -> None:
    run = Fleet(fleet(workers=1), router_of("kv"), chats(3))
    while run.advance():
        pass
    cached = [record.cached_token_count / record.prompt_token_count for record in run.records if record.cached_token_count > 300]
    assert cached
    assert all(record.cached_token_count <= record.prompt_token_count - 1 for record in run.records)


def test_several_frontends_share_the_workers() -> None:
    load = burst_load(3, 24, 2.0, 16, shape=SHAPE)
    found = simulate(fleet(frontends=4), router_of("kv"), load)
    assert (found.request_count, found.refused_count) == (72, 0)
    assert found.worst_overload_tokens > 0


def test_a_trace_in_mooncakes_form(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 4000, "input_length": 1600, "output_length": 5, "hash_ids": [0, 1, 3, 4]},
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    load = mooncake_load(trace, 10, speedup=2)
    first, second = (conversation.turns[0] for conversation in load)
    assert (first.token_count, second.token_count) == (1100, 1600)
    assert first.sequence_hashes == second.sequence_hashes[:2]
    assert first.sequence_hashes[1] != second.sequence_hashes[2]
    assert load[1].start_ns == 2_000_000_000
    settings = FleetSettings(MockSettings(resolve_model("demo").location, block_size=512), worker_count=2)
    assert simulate(settings, router_of("kv"), load).hit_rate == pytest.approx(1024 / 2700)


def test_a_broken_trace_is_named(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0}\n')
    with pytest.raises(ConfigurationError, match=r"line 1 of .*trace\.jsonl is not of Mooncake's form"):
        mooncake_load(trace, 10)
    trace.write_text('{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [7]}\n')
    with pytest.raises(ConfigurationError, match="1 hash_ids for 2 full blocks"):
        mooncake_load(trace, 10)
