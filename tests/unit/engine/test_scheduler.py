"""The scheduler without a model: budgets, order, admission, preemption; and no history in which it loses a request or a block."""

from __future__ import annotations

import json

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tokenizers import Tokenizer as InnerTokenizer
from tokenizers import models

from polyphase.core.errors import KvError, Overloaded
from polyphase.engines.batching.sampling_state import SamplingState
from polyphase.engines.batching.scheduler import Row, Scheduler, SchedulerLimits, StepPlan
from polyphase.engines.batching.sequence import Sequence
from polyphase.engines.batching.stopping import StopLimits, StopRule
from polyphase.kv import BlockPool, PrefixCache
from polyphase.text import Tokenizer
from polyphase.wire.requests import SamplingParams, StopConditions, Submit

SIZE = 4
LIMITS = StopLimits(frozenset(), 10_000, Tokenizer.from_json(json.dumps(json.loads(InnerTokenizer(models.BPE()).to_str())).encode()))


class Bench:
    """A scheduler and what surrounds it in the engine, with tokens that count upwards."""

    def __init__(
        self, block_count: int = 64, budget: int = 32, max_running: int = 8, max_waiting: int = 100, prefill_budget: int | None = None
    ) -> None:
        self.pool = BlockPool(block_count)
        self.cache = PrefixCache(self.pool, SIZE, "test")
        self.scheduler = Scheduler(SchedulerLimits(budget, max_running, max_waiting, prefill_budget), self.cache)
        self.budget = budget
        self.prefill_budget = prefill_budget or budget
        self.arrivals = 0
        self.alive: dict[Sequence, int] = {}  # and how many tokens it still wants

    def add(self, prompt: list[int], wanted: int = 1, priority: int = 0) -> Sequence:
        self.arrivals += 1
        request = Submit(
            request_id=f"r{self.arrivals}",
            token_ids=prompt,
            prompt_token_count=len(prompt),
            sampling=SamplingParams(seed=0),
            stop=StopConditions(max_tokens=wanted),
            priority=priority,
        )
        sequence = Sequence(
            request=request,
            arrival=self.arrivals,
            arrived_ns=0,
            token_ids=list(prompt),
            blocks=self.cache.open(prompt, None),
            sampling=SamplingState(request.sampling, prompt, len(prompt)),
            stop=StopRule(request, LIMITS),
        )
        self.scheduler.refuse_if_full(request.request_id)
        self.scheduler.add(sequence)
        self.alive[sequence] = wanted
        return sequence

    def finish(self, plan: StepPlan) -> None:
        for row in plan.rows:
            sequence = row.sequence
            is_sampled = row.is_sampled
            sequence.computed_count = row.start + row.count
            self.cache.commit(sequence.blocks, sequence.token_ids, sequence.computed_count)
            if is_sampled:
                sequence.token_ids.append(len(sequence.token_ids) % 7)
                self.alive[sequence] -= 1
                if self.alive[sequence] == 0:
                    self.end(sequence)

    def end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        del self.alive[sequence]

    def step(self) -> StepPlan:
        plan = self.scheduler.plan()
        self.check(plan)
        self.finish(plan)
        return plan

    def check(self, plan: StepPlan) -> None:
        is_decoding = any(row.count == 1 and row.is_sampled for row in plan.rows)
        assert sum(row.count for row in plan.rows) <= (self.budget if is_decoding else self.prefill_budget)
        assert len({row.sequence for row in plan.rows}) == len(plan.rows)
        for row in plan.rows:
            assert row.count >= 1
            assert row.start == row.sequence.computed_count
            assert len(row.sequence.blocks.block_ids) * SIZE >= row.start + row.count
            assert row.sequence in self.scheduler.running

    def drain(self, step_limit: int = 2000) -> None:
        for _ in range(step_limit):
            if not self.alive:
                return
            self.step()
        raise AssertionError("some sequences never end")


def counts(plan: StepPlan) -> list[tuple[str, int]]:
    return [(row.sequence.request.request_id, row.count) for row in plan.rows]


def test_decodes_come_first_and_prompts_share_what_is_left() -> None:
    bench = Bench(budget=10)
    bench.add([1, 2, 3], wanted=5)
    bench.step()
    bench.add(list(range(100, 112)))
    bench.add(list(range(200, 204)))
    assert counts(bench.step()) == [("r1", 1), ("r2", 9)]
    assert counts(bench.step()) == [("r1", 1), ("r2", 3), ("r3", 4)]


def test_a_step_without_decodes_may_be_larger() -> None:
    bench = Bench(budget=10, prefill_budget=20)
    bench.add(list(range(100, 125)), wanted=3)
    assert counts(bench.step()) == [("r1", 20)]
    assert counts(bench.step()) == [("r1", 5)]
    bench.add(list(range(200, 215)))
    assert counts(bench.step()) == [("r1", 1), ("r2", 9)]


def test_order_is_priority_then_arrival() -> None:
    bench = Bench(budget=4, max_running=1)
    bench.add([1], priority=5)
    bench.add([2], priority=5)
    bench.add([3], priority=-1)
    assert [counts(bench.step())[0][0] for _ in range(3)] == ["r3", "r1", "r2"]


def test_nobody_overtakes_a_prompt_that_must_wait_for_blocks() -> None:
    bench = Bench(block_count=6)
    first = bench.add(list(range(16)), wanted=3)
    bench.step()
    bench.add(list(range(100, 112)))
    bench.add([7])
    assert counts(bench.step()) == [("r1", 1)]
    bench.end(first)
    assert [name for name, _ in counts(bench.step())] == ["r2", "r3"]


def test_a_hit_is_not_computed_again() -> None:
    bench = Bench()
    bench.add(list(range(9)))
    bench.step()
    bench.add([*range(8), 99, 98])
    assert bench.step().rows[0].start == 8


def test_preemption_takes_the_last_in_order() -> None:
    bench = Bench(block_count=5)
    first = bench.add(list(range(8)), wanted=10)
    second = bench.add(list(range(100, 107)), wanted=10)
    preempted: list[Sequence] = []
    while not preempted:
        preempted = bench.step().preempted
    assert preempted == [second]
    assert second.computed_count == 0
    assert first in bench.scheduler.running
    bench.drain()
    assert bench.pool.used_count == 0


def test_every_running_sequence_gets_a_token_in_each_step() -> None:
    bench = Bench(budget=3, max_running=8)
    for start in range(5):
        bench.add([start * 10], wanted=20)
    bench.step()
    for _ in range(5):
        assert [count for _, count in counts(bench.step())] == [1, 1, 1]


def test_a_limit_of_one_step_cuts_prompts_but_not_those_that_decode() -> None:
    bench = Bench(budget=32, prefill_budget=64)
    first = bench.add(list(range(100)), wanted=3)
    plan = bench.scheduler.plan(prefill_limit=10)
    assert [row.count for row in plan.rows] == [10]
    first.computed_count = len(first.token_ids) - 1  # it decodes now
    bench.add(list(range(200, 300)))
    assert [row.count for row in bench.scheduler.plan(prefill_limit=10).rows] == [1, 10]
    assert [row.count for row in bench.scheduler.plan(prefill_limit=1000).rows] == [1, 31]


def test_too_many_waiting_are_refused() -> None:
    bench = Bench(max_waiting=2)
    bench.add([1])
    bench.add([2])
    with pytest.raises(Overloaded, match="2 requests wait"):
        bench.add([3])


def test_removing_twice_is_an_error() -> None:
    bench = Bench()
    sequence = bench.add([1])
    bench.scheduler.remove(sequence)
    with pytest.raises(KvError, match="not scheduled"):
        bench.scheduler.remove(sequence)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, go and are computed, in a pool that is nearly too small."""

    @initialize(block_count=st.integers(6, 20), budget=st.integers(1, 16), max_running=st.integers(1, 6))
    def build(self, block_count: int, budget: int, max_running: int) -> None:
        self.bench = Bench(block_count, budget, max_running)
        self.plan: StepPlan | None = None

    @rule(start=st.integers(0, 3), length=st.integers(1, 14), wanted=st.integers(1, 10), priority=st.integers(0, 2))
    def arrive(self, start: int, length: int, wanted: int, priority: int) -> None:
        self.bench.add(list(range(start, start + length)), wanted, priority)  # 24 tokens at most: 6 blocks

    @rule()
    def begin(self) -> None:
        if self.plan is None:
            self.plan = self.bench.scheduler.plan()
            self.bench.check(self.plan)
            if self.bench.alive and not self.plan.preempted:
                assert self.plan.rows

    @rule()
    def finish(self) -> None:
        if self.plan is not None:
            self.bench.finish(self.plan)
            self.plan = None

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.plan is None and self.bench.alive:
            self.bench.end(data.draw(st.sampled_from(list(self.bench.alive))))

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "bench"):
            return
        scheduler, pool = self.bench.scheduler, self.bench.pool
        pool.check_invariants()
        assert set(scheduler.waiting) | set(scheduler.running) == set(self.bench.alive)
        assert list(scheduler.waiting) == sorted(scheduler.waiting, key=lambda s: s.rank)
        assert list(scheduler.running) == sorted(scheduler.running, key=lambda s: s.rank)
        assert 0 <= scheduler.uncomputed_prefill_tokens <= sum(s.uncomputed_count for s in self.bench.alive)
        held = [block for s in scheduler.running for block in s.blocks.block_ids]
        assert pool.used_count == len(set(held))
        writing = [self.written(row) for row in (self.plan.rows if self.plan else [])]
        assert all(held.count(block) == 1 for blocks in writing for block in blocks)

    @staticmethod
    def written(row: Row) -> list[int]:
        return list(row.sequence.blocks.block_ids[row.start // SIZE : -(-(row.start + row.count) // SIZE)])

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            self.finish()
            self.bench.drain()
            assert self.bench.pool.used_count == 0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


def test_a_prompt_that_another_one_computes_just_now_is_not_computed_twice() -> None:
    bench = Bench(budget=40)
    prompt = list(range(100, 124))
    bench.add(prompt)
    twin = bench.add([*prompt, 1])
    other = bench.add(list(range(200, 208)))
    assert counts(bench.step()) == [("r1", 24), ("r3", 8)], "the second one waits, and only for that it is overtaken"
    assert counts(bench.step()) == [("r2", 1)]
    assert twin not in bench.alive
    assert other not in bench.alive


def test_a_prompt_that_shares_little_does_not_wait() -> None:
    bench = Bench(budget=40)
    prompt = list(range(100, 108))
    bench.add([*prompt, *range(8)])
    bench.add([*prompt, *range(50, 62)])
    assert counts(bench.step()) == [("r1", 16), ("r2", 20)]


def test_a_sequence_that_waits_for_another_goes_on_when_that_is_gone() -> None:
    bench = Bench(budget=8)
    prompt = list(range(100, 124))
    first = bench.add(prompt)
    bench.add([*prompt, 1])
    assert counts(bench.step()) == [("r1", 8)]
    bench.end(first)
    assert counts(bench.step()) == [("r2", 8)], "what was computed is found"
    bench.drain()
