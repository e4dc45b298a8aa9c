"""Each reason for which predictions and reports drift apart is told from the others, and a healthy router is never accused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyphase.core.ids import Epoch, WorkerId
from polyphase.router.drift import MIN_SAMPLES, DriftReason, Sample, StreamFacts, Verdict, diagnose
from polyphase.router.drift_watch import SETTLE_NS, WINDOW_NS, DriftWatch

BLOCK = 16
HEALTHY = StreamFacts(silent_ns=500_000_000, indexed_block_count=400, held_block_count=410, pool_block_count=1000)
SECOND = 10**9


def sample(
    predicted: int, reported: int, later: int | None = None, *, prompt: int = 1000, removed: int = 0, salted: bool = False
) -> Sample:
    return Sample(0, prompt, predicted, reported, predicted if later is None else later, removed, salted)


RIGHT = [sample(480, 480)] * MIN_SAMPLES


@pytest.mark.parametrize(
    ("given_sample", "verdict"),
    [
        (sample(0, 0), Verdict.SILENT),
        (sample(480, 480), Verdict.AGREES),
        (sample(480, 475), Verdict.AGREES),
        (sample(976, 991, prompt=992), Verdict.AGREES),  # the engine computes the last token alone
        (sample(0, 15, prompt=16), Verdict.AGREES),
        (sample(0, 480, later=480), Verdict.AGREES),  # computed after routing
        (sample(0, 480, later=0), Verdict.UNDER),
        (sample(0, 480, later=64), Verdict.UNDER),
        (sample(0, 480, later=64, removed=3), Verdict.SILENT),  # known meanwhile, perhaps
        (sample(0, 480, later=0, removed=3), Verdict.UNDER),
        (sample(480, 0), Verdict.OVER),
        (sample(480, 464), Verdict.OVER),
    ],
)
def test_verdicts(given_sample: Sample, verdict: Verdict) -> None:
    assert given_sample.verdict(BLOCK) is verdict


UNKNOWN = [sample(0, 480 + 16 * number, later=0) for number in range(MIN_SAMPLES)]
STALE = [sample(480, 32)] * MIN_SAMPLES


@pytest.mark.parametrize(
    ("samples", "stream", "reason", "words"),
    [
        (UNKNOWN, replace(HEALTHY, silent_ns=None), DriftReason.SILENT_STREAM, "ever arrived"),
        (UNKNOWN, replace(HEALTHY, silent_ns=12 * SECOND), DriftReason.SILENT_STREAM, "silent for 12 s"),
        (UNKNOWN, replace(HEALTHY, indexed_block_count=0), DriftReason.SILENT_STREAM, "announces none"),
        ([sample(0, 64 * n, later=0, prompt=9999) for n in range(1, 13)], HEALTHY, DriftReason.BLOCK_SIZE, "steps of 64 tokens"),
        ([sample(0, 20 * n, later=0, prompt=9999) for n in range(4, 16)], HEALTHY, DriftReason.BLOCK_SIZE, "steps of 20 tokens"),
        (RIGHT + [sample(0, 480, later=0, salted=True)] * 8, HEALTHY, DriftReason.SALT, "cache_salt"),
        (RIGHT + [sample(480, 0, salted=True)] * 8, HEALTHY, DriftReason.SALT, "cache_salt"),
        (UNKNOWN, HEALTHY, DriftReason.HASH_RECIPE, "400 blocks are announced and none ever matches"),
        (UNKNOWN, replace(HEALTHY, repair_count=3), DriftReason.LOST_EVENTS, "repaired 3 times"),
        (RIGHT + UNKNOWN, HEALTHY, DriftReason.LOST_EVENTS, "missing in its event stream"),
        (STALE, HEALTHY, DriftReason.LOST_EVENTS, "no longer has"),
        (STALE, replace(HEALTHY, silent_ns=7 * SECOND), DriftReason.SILENT_STREAM, "silent for 7 s"),
        ([replace(one, removed_block_count=2) for one in STALE], HEALTHY, DriftReason.EVICTION, "evicted between"),
        ([sample(480, 0)] * MIN_SAMPLES, HEALTHY, DriftReason.NOT_REPORTED, "no cached tokens at all"),
    ],
)
def test_each_reason_is_named(samples: list[Sample], stream: StreamFacts, reason: DriftReason, words: str) -> None:
    drift = diagnose(samples, stream, BLOCK)
    assert drift is not None
    assert drift.reason is reason
    assert words in drift.message


def test_one_shared_prefix_does_not_look_like_a_block_size() -> None:
    drift = diagnose([sample(0, 480, later=0)] * MIN_SAMPLES, HEALTHY, BLOCK)
    assert drift is not None
    assert drift.reason is DriftReason.HASH_RECIPE


def test_a_few_are_not_enough() -> None:
    assert diagnose(UNKNOWN[:-1], HEALTHY, BLOCK) is None
    assert diagnose(UNKNOWN[:-1] + [sample(0, 0)] * 50, HEALTHY, BLOCK) is None
    assert diagnose(RIGHT * 3 + UNKNOWN[:8], HEALTHY, BLOCK) is None


blocks = st.integers(0, 60)


@given(
    st.lists(st.tuples(blocks, blocks, st.booleans(), st.integers(0, 5), st.integers(1, 1000)), max_size=80),
    st.integers(0, 3),
)
@settings(max_examples=200, deadline=None)
def test_a_working_router_is_never_accused(cases: list[tuple[int, int, bool, int, int]], repairs: int) -> None:
    """Predictions that were right when made, and prefixes that were computed in the meantime, whatever else is going on."""
    samples = []
    for held, computed_since, salted, removed, prompt in cases:
        usable = (prompt - 1) // BLOCK * BLOCK  # the last token is computed in any case, as both sides know
        found = min((held + computed_since) * BLOCK, usable)
        samples.append(Sample(0, prompt, min(held * BLOCK, usable), found, (held + computed_since) * BLOCK, removed, salted))
    assert diagnose(samples, replace(HEALTHY, repair_count=repairs), BLOCK) is None


WORKER = WorkerId("w")


def watching(now_ns: int = 0) -> DriftWatch:
    watch = DriftWatch()
    watch.begin(WORKER, Epoch(1), BLOCK, now_ns)
    return watch


def feed(watch: DriftWatch, samples: list[Sample], at_ns: int, epoch: int = 1) -> None:
    for one in samples:
        watch.note(WORKER, Epoch(epoch), replace(one, routed_ns=at_ns))


def test_a_worker_that_has_just_joined_is_not_judged() -> None:
    watch = watching()
    feed(watch, UNKNOWN * 5, SETTLE_NS - 1)
    assert watch.judge(WORKER, replace(HEALTHY, silent_ns=None), SETTLE_NS * 2) is None
    feed(watch, UNKNOWN, SETTLE_NS)
    assert watch.judge(WORKER, HEALTHY, SETTLE_NS * 2) is not None


def test_an_alarm_ends_when_clearly_fewer_differ() -> None:
    watch = watching()
    now_ns = 2 * SETTLE_NS
    feed(watch, RIGHT * 2 + UNKNOWN, now_ns)
    assert watch.judge(WORKER, HEALTHY, now_ns) is not None
    feed(watch, RIGHT * 2, now_ns)
    assert watch.judge(WORKER, HEALTHY, now_ns) is not None, "12 of 60: an alarm goes on that would not begin"
    assert diagnose(RIGHT * 4 + UNKNOWN, HEALTHY, BLOCK) is None
    feed(watch, RIGHT * 3, now_ns)
    assert watch.judge(WORKER, HEALTHY, now_ns) is None


def test_old_samples_and_old_lives_do_not_count() -> None:
    watch = watching()
    now_ns = 2 * SETTLE_NS
    feed(watch, UNKNOWN, now_ns)
    assert watch.judge(WORKER, HEALTHY, now_ns + WINDOW_NS) is not None
    assert watch.judge(WORKER, HEALTHY, now_ns + WINDOW_NS + 1) is None
    feed(watch, UNKNOWN, now_ns)
    watch.begin(WORKER, Epoch(1), BLOCK, now_ns)
    assert watch.judge(WORKER, HEALTHY, now_ns) is not None, "the same life goes on"
    watch.begin(WORKER, Epoch(2), BLOCK, now_ns)
    feed(watch, UNKNOWN, 5 * SETTLE_NS, epoch=1)
    assert watch.judge(WORKER, HEALTHY, 5 * SETTLE_NS) is None
    watch.forget(WORKER)
    feed(watch, UNKNOWN, 5 * SETTLE_NS, epoch=2)
    assert watch.judge(WORKER, HEALTHY, 5 * SETTLE_NS) is None


def test_repairs_count_within_the_window_only() -> None:
    watch = watching()
    assert watch.judge(WORKER, replace(HEALTHY, repair_count=7), SECOND) is None
    later_ns = SECOND + WINDOW_NS + SETTLE_NS
    feed(watch, UNKNOWN, later_ns)
    drift = watch.judge(WORKER, replace(HEALTHY, repair_count=7), later_ns)
    assert drift is not None
    assert drift.reason is DriftReason.HASH_RECIPE, "the repairs were long ago"
    drift = watch.judge(WORKER, replace(HEALTHY, repair_count=8), later_ns)
    assert drift is not None
    assert drift.reason is DriftReason.LOST_EVENTS
    assert "once" in drift.message
