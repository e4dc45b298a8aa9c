"""What a worker found cached, told with the first token or, by engines that are servers of their own, with the last."""

from __future__ import annotations

from polyphase.frontend.records import SequenceRecord
from polyphase.wire.requests import PhaseStats


def test_stats_with_the_last_token_count() -> None:
    record = SequenceRecord(started_ns=1)
    record.note_tokens(5, now_ns=2)
    record.note_stats(PhaseStats(cached_token_count=320))
    assert record.cached_tokens == 320


def test_those_of_the_leg_that_computed_the_prompt_stay() -> None:
    record = SequenceRecord(started_ns=1)
    record.note_stats(PhaseStats(cached_token_count=64))
    record.note_tokens(1, now_ns=2)
    record.note_stats(PhaseStats(cached_token_count=320))
    assert record.cached_tokens == 64


def test_a_worker_that_took_over_does_not_tell_of_the_beginning() -> None:
    record = SequenceRecord(started_ns=1)
    record.note_tokens(5, now_ns=2)
    record.migrations = 1
    record.note_stats(PhaseStats(cached_token_count=320))
    assert record.cached_tokens == 0
