from __future__ import annotations

from polyphase.launch.backoff import Backoff, BackoffRule


def test_doubles_up_to_a_limit():
    backoff = Backoff(BackoffRule(first_s=1, max_s=30, healthy_s=60))
    assert [backoff.after_life_of(0.5) for _ in range(8)] == [1, 2, 4, 8, 16, 30, 30, 30]


def test_a_healthy_life_begins_anew():
    backoff = Backoff(BackoffRule(first_s=1, max_s=30, healthy_s=60))
    assert [backoff.after_life_of(59) for _ in range(3)] == [1, 2, 4]
    assert backoff.after_life_of(60) == 1
    assert backoff.after_life_of(0) == 2
