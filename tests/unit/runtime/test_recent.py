from __future__ import annotations

import pytest

from polyphase.runtime import recent
from polyphase.runtime.recent import RecentBatches


def batch(number: int) -> bytes:
    return f"batch {number:03}".encode()


def filled(count: int, max_batches: int = 100, max_bytes: int = 10_000) -> RecentBatches:
    kept = RecentBatches(max_batches, max_bytes)
    for number in range(1, count + 1):
        kept.add(number, batch(number))
    return kept


def test_what_lies_behind_a_number_comes_in_order():
    assert filled(6).after(3) == [batch(4), batch(5), batch(6)]
    assert filled(6).after(0)[0] == batch(1)
    assert filled(6).after(6) == filled(6).after(60) == filled(0).after(0) == filled(6).after(-5) == []


def test_it_is_bounded_in_number_and_bytes():
    assert filled(500).after(399) == []
    assert filled(500).after(400)[0] == batch(401)
    assert filled(500, max_bytes=90).after(489) == []
    assert len(filled(500, max_bytes=90).after(490)) == 10
    assert filled(3, max_bytes=1).after(2) == [batch(3)]


def test_long_answers_are_cut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recent, "MAX_ANSWER_BYTES", 25)
    assert filled(9).after(2) == [batch(3), batch(4)]
    monkeypatch.setattr(recent, "MAX_ANSWER_BYTES", 1)
    assert filled(9).after(2) == [batch(3)]
