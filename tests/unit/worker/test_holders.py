"""How long a holder is waited for, and how seldom one that does not answer is asked."""

from __future__ import annotations

import pytest

from polyphase.wire.kv import KvLayout
from polyphase.wire.requests import KvHolder
from polyphase.worker.holders import LONGEST_SILENCE_S, SILENCE_S, Silences
from polyphase.worker.patience import LONGEST_FIRST_S, SHORTEST_FIRST_S, Patience

LAYOUT = KvLayout("float32", 1, 1, 1, 16, 1_000_000, "f")
LIFE = ("w", 1)
S = 10**9


def holder(compute_ms: float | None, tokens: int = 1600) -> KvHolder:
    return KvHolder("w", 1, "ipc://w", tokens, compute_ms)


@pytest.mark.parametrize(
    ("compute_ms", "first_s"), [(None, LONGEST_FIRST_S), (1.0, SHORTEST_FIRST_S), (400.0, 0.2), (60_000.0, LONGEST_FIRST_S)]
)
def test_a_request_loses_half_of_what_it_could_gain_at_most(compute_ms: float | None, first_s: float) -> None:
    assert Patience.with_holder(holder(compute_ms), 0, LAYOUT).until_s(0) == pytest.approx(first_s)


def test_the_end_moves_away_as_fast_as_blocks_would_be_computed() -> None:
    patience = Patience.with_holder(holder(500.0), 50, LAYOUT)  # 50 of the 100 blocks are here
    assert patience.until_s(50) == pytest.approx(0.25 + 0.5)
    assert patience.until_s(5) == pytest.approx(0.25 + 0.05)
    unknown = Patience.with_holder(holder(None), 0, LAYOUT)
    assert unknown.until_s(100) == pytest.approx(0.5 + 1.0), "100 MB a second"
    assert Patience.with_holder(holder(100.0, tokens=0), 50, LAYOUT).per_block_s == pytest.approx(0.1), "whatever a hint may say"


def test_silence_is_asked_less_and_less_and_an_answer_makes_good() -> None:
    silences = Silences()
    now = 0
    for length_s in (SILENCE_S, 2 * SILENCE_S, 4 * SILENCE_S, 8 * SILENCE_S, LONGEST_SILENCE_S, LONGEST_SILENCE_S):
        assert not silences.is_silent(LIFE, now)
        silences.note_silence(LIFE, now)
        assert silences.is_silent(LIFE, now + int(length_s * S) - 1)
        now += int(length_s * S)
    assert not silences.is_silent(("w", 2), 0), "its next life is another"
    silences.note_answer(LIFE)
    silences.note_silence(LIFE, now)
    assert not silences.is_silent(LIFE, now + int(SILENCE_S * S))
