"""Who stands still is told from who is slow, from step counters and time alone."""

from __future__ import annotations

import pytest

from polyphase.core.ids import WorkerId
from polyphase.frontend.stall import Recovered, Stalled, StallRule, StallWatch
from polyphase.wire.events import Load

S = 1_000_000_000
MS = 1_000_000
A, B = WorkerId("a"), WorkerId("b")
RULE = StallRule()


class Played:
    """One worker, played step by step; the watch is checked four times a second, and heartbeats come every second."""

    def __init__(self, rule: StallRule = RULE) -> None:
        self.watch = StallWatch(rule)
        self.now_ns = 1000 * S
        self.step = self.computed = 0
        self.running = self.waiting_tokens = 0
        self.changes: list[tuple[float, Stalled | Recovered]] = []
        self.watch.joined(A, 512, self.now_ns)
        self.report()

    def report(self) -> None:
        load = Load(
            step=self.step,
            running_count=self.running,
            waiting_prefill_tokens=self.waiting_tokens,
            computed_tokens_total=self.computed,
        )
        self.watch.note_load(A, load, self.now_ns)

    def give(self, token_count: int) -> None:
        self.watch.note_sent(A, token_count, self.now_ns)
        self.running += 1
        self.waiting_tokens += token_count
        self.report()

    def steps(self, count: int, step_ms: float, tokens: int = 1) -> None:
        for _ in range(count):
            self.passes(step_ms / 1e3)
            self.step += 1
            self.computed += tokens
            self.waiting_tokens = max(0, self.waiting_tokens - tokens)
            self.watch.note_step(A, self.step, self.now_ns)
            self.report()

    def ends(self) -> None:
        self.running = 0
        self.report()

    def passes(self, seconds: float, *, beats: bool = True) -> None:
        """Nothing but heartbeats."""
        end_ns = self.now_ns + int(seconds * S)
        began_ns = self.now_ns
        while self.now_ns < end_ns:
            before_ns = self.now_ns
            self.now_ns = min(end_ns, self.now_ns + int(RULE.interval_s * S))
            if beats and (self.now_ns - began_ns) // S != (before_ns - began_ns) // S:
                self.report()
            self.changes += [((self.now_ns - began_ns) / S, change) for change in self.watch.check(self.now_ns)]


def test_an_engine_that_is_stuck_while_its_process_lives() -> None:
    worker = Played()
    worker.give(100)
    worker.steps(1, 50, tokens=100)
    worker.steps(20, 20)
    worker.passes(10)
    [(after_s, change)] = worker.changes
    assert change == Stalled(A, change.reason if isinstance(change, Stalled) else "")
    assert after_s == pytest.approx(RULE.least_s, abs=0.3)
    worker.changes.clear()
    worker.step += 1
    worker.watch.note_step(A, worker.step, worker.now_ns)
    worker.passes(0.25)
    assert [change for _, change in worker.changes] == [Recovered(A)]


def test_a_stopped_process_is_noticed_by_its_silence_even_while_idle() -> None:
    worker = Played()
    worker.passes(10)
    assert not worker.changes
    worker.passes(10, beats=False)
    [(after_s, change)] = worker.changes
    assert isinstance(change, Stalled)
    assert after_s == pytest.approx(RULE.silence_s, abs=0.3)
    worker.report()
    worker.passes(0.25)
    assert worker.changes[-1][1] == Recovered(A)


def test_an_idle_worker_makes_no_steps_and_is_well() -> None:
    worker = Played()
    worker.give(100)
    worker.steps(10, 20, tokens=20)
    worker.ends()
    worker.passes(60)
    assert not worker.changes


def test_the_first_steps_may_take_long_because_kernels_are_compiled() -> None:
    worker = Played()
    worker.give(2000)
    worker.passes(RULE.unknown_s - 2)
    worker.steps(1, 10, tokens=512)
    assert not worker.changes


def test_a_long_prompt_behind_short_steps_is_waited_for_at_the_pace_seen() -> None:
    worker = Played()
    worker.give(512)
    worker.steps(1, 1000, tokens=512)  # 2 ms a token
    worker.steps(500, 20)
    worker.passes(0)
    assert not worker.changes
    worker.give(2048)
    allowed_s = worker.watch.allowed_ns(A, worker.now_ns) / S
    assert allowed_s > 3 * 4.096
    worker.steps(1, 4096, tokens=2048)
    assert not worker.changes


def test_without_a_prompt_seen_a_queued_one_gets_the_time_of_the_unknown() -> None:
    worker = Played()
    worker.give(1)
    worker.steps(50, 20)
    assert worker.watch.allowed_ns(A, worker.now_ns) == RULE.least_s * S
    worker.give(2000)
    assert worker.watch.allowed_ns(A, worker.now_ns) == RULE.unknown_s * S


def test_a_queue_of_any_length_is_waited_for_no_longer_than_a_step_of_it() -> None:
    worker = Played()
    worker.give(512)
    worker.steps(1, 100, tokens=512)
    worker.give(4 * 512)
    one_step_ns = worker.watch.allowed_ns(A, worker.now_ns)
    worker.give(1_000_000)
    assert worker.watch.allowed_ns(A, worker.now_ns) == pytest.approx(one_step_ns, rel=0.01)


def test_idle_time_is_no_step_time() -> None:
    worker = Played()
    worker.give(64)
    worker.steps(5, 20, tokens=64)
    worker.ends()
    worker.passes(300)
    worker.give(64)
    worker.steps(1, 20, tokens=64)
    assert worker.watch.allowed_ns(A, worker.now_ns) == RULE.least_s * S


def test_a_false_alarm_makes_the_next_one_come_later() -> None:
    worker = Played()
    worker.give(64)
    worker.steps(5, 20, tokens=64)
    worker.steps(1, 3000)
    assert [type(change) for _, change in worker.changes] == [Stalled]
    worker.passes(0.25)
    worker.changes.clear()
    worker.steps(3, 3000)
    assert not worker.changes


def test_a_listener_that_was_held_up_blames_nobody() -> None:
    worker = Played()
    worker.give(64)
    worker.steps(5, 20, tokens=64)
    worker.now_ns += 60 * S  # this process was stopped, and what was sent to it meanwhile is not read yet
    assert worker.watch.check(worker.now_ns) == []
    worker.passes(10)
    assert len(worker.changes) == 1


def test_what_was_sent_to_a_worker_that_never_answers_counts_as_running() -> None:
    watch = StallWatch(RULE)
    now_ns = 1000 * S
    watch.joined(A, 512, now_ns)
    watch.joined(B, 512, now_ns)
    for worker_id in (A, B):
        watch.note_load(worker_id, Load(step=5), now_ns)
    watch.note_sent(A, 4, now_ns)
    watch.note_step(A, 6, now_ns + 10 * MS)
    watch.note_load(A, Load(step=6), now_ns + 11 * MS)
    watch.note_sent(A, 4, now_ns + 20 * MS)
    found = []
    for tick in range(1, 16):
        found += watch.check(now_ns + tick * 250 * MS)
    assert [type(change) for change in found] == [Stalled]
    assert found[0].worker_id == A
    assert watch.is_stalled(A)
    assert not watch.is_stalled(B)
    watch.left(A)
    assert not watch.is_stalled(A)


def test_a_worker_that_says_it_can_serve_nothing_is_taken_at_its_word() -> None:
    watch = StallWatch(RULE)
    watch.joined(A, 512, 0)
    watch.note_load(A, Load(outage="the server cannot be reached"), 1 * S)
    assert watch.check(1 * S) == [Stalled(A, "the server cannot be reached")]
    watch.note_load(A, Load(), 2 * S)
    assert watch.check(2 * S) == [Recovered(A)]
