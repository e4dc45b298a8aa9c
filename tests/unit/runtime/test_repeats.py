"""What may be said twice is kept for as long as it may matter, by worker."""

from __future__ import annotations

from polyphase.core.clock import ManualClock
from polyphase.runtime import Repeats
from polyphase.runtime.repeats import KEPT_S, MAX_KEPT
from polyphase.wire.requests import Cancel, ReleaseLease


def test_only_what_is_recent_and_of_that_worker_is_said_again() -> None:
    clock = ManualClock()
    repeats = Repeats(clock)
    repeats.note("a", ReleaseLease("old"))
    clock.advance(int(KEPT_S * 1e9))
    repeats.note("a", Cancel("r"))
    repeats.note("b", ReleaseLease("x"))
    repeats.note("a", ReleaseLease("y"))
    assert repeats.of("a") == [ReleaseLease("old"), Cancel("r"), ReleaseLease("y")]
    clock.advance(1)
    assert repeats.of("a") == repeats.of("a") == [Cancel("r"), ReleaseLease("y")]
    assert repeats.of("b") == [ReleaseLease("x")]
    assert repeats.of("c") == []


def test_the_memory_is_bounded() -> None:
    repeats = Repeats()
    for number in range(MAX_KEPT + 10):
        repeats.note("a", Cancel(str(number)))
    assert repeats.of("a") == [Cancel(str(number)) for number in range(10, MAX_KEPT + 10)]
