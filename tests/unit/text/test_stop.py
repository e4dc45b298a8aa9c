from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyphase.text import StopStringMatcher

LETTERS = st.text(alphabet="abc", max_size=30)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=3)


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Look at every beginning of the text, shortest first."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(text=LETTERS, stops=STOPS, cuts=st.lists(st.integers(0, 6), min_size=1, max_size=5), include=st.booleans())
def test_equals_the_naive_search_however_the_text_is_cut(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    matcher = StopStringMatcher(stops, include)
    shown, matched, start, turn = "", None, 0, 0
    while start < len(text):
        size = cuts[turn % len(cuts)] or 1
        emit, matched = matcher.push(text[start : start + size])
        shown += emit
        start, turn = start + size, turn + 1
    shown += matcher.flush()
    assert (shown, matched) == naive(text, stops, include)


@given(text=LETTERS, stops=STOPS)
def test_holds_back_only_what_may_become_a_match(text: str, stops: list[str]) -> None:
    matcher = StopStringMatcher(stops)
    shown = ""
    for end, char in enumerate(text, 1):
        emit, matched = matcher.push(char)
        shown += emit
        if matched:
            break
        held = text[len(shown) : end]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_the_match_that_is_complete_first_wins() -> None:
    assert StopStringMatcher(["abc", "b"]).push("xabc") == ("xa", "b")
    assert StopStringMatcher(["b", "ab"]).push("xab") == ("x", "ab")


def test_nothing_is_shown_after_a_match() -> None:
    matcher = StopStringMatcher(["END"])
    assert matcher.push("text EN") == ("text ", None)
    assert matcher.push("D more") == ("", "END")
    assert matcher.push("and more") == ("", "END")
    assert matcher.flush() == ""
    assert matcher.matched == "END"


def test_the_stop_string_can_be_kept() -> None:
    matcher = StopStringMatcher(["\n\n"], include_stop=True)
    assert matcher.push("line\n") == ("line", None)
    assert matcher.push("\nnext") == ("\n\n", "\n\n")


def test_a_near_match_is_shown_in_the_end() -> None:
    matcher = StopStringMatcher(["STOP"])
    assert matcher.push("do not STO") == ("do not ", None)
    assert matcher.flush() == "STO"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStringMatcher(["x", ""])
