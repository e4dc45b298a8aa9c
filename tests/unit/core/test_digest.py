"""The digest of a set of blocks: the recipe, and the extension against the Python code."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyphase.core import native
from polyphase.core.digest import add_sums, digest_sum, mixed, subtract_sums

HASHES = st.lists(st.integers(0, 2**64 - 1), max_size=30)


def test_the_recipe_is_written_down():
    # The first outputs of SplitMix64 seeded with 0 and with 1.
    assert mixed(0) == 0xE220A8397B1DCDAF
    assert mixed(1) == 0x910A2DEC89025CC1
    assert digest_sum([0, 1]) == (0xE220A8397B1DCDAF + 0x910A2DEC89025CC1) % 2**64
    assert digest_sum([]) == 0


@given(HASHES, HASHES)
def test_sums_do_not_depend_on_order_and_can_be_taken_apart(some: list[int], others: list[int]):
    whole = digest_sum(some + others)
    assert whole == digest_sum((some + others)[::-1]) == add_sums(digest_sum(some), digest_sum(others))
    assert subtract_sums(whole, digest_sum(others)) == digest_sum(some) == sum(map(mixed, some)) % 2**64
    assert digest_sum(array("Q", some)) == digest_sum(tuple(some)) == digest_sum(iter(some)) == digest_sum(some)


def test_without_the_extension_nothing_changes(monkeypatch: pytest.MonkeyPatch):
    before = digest_sum(range(100))
    monkeypatch.setattr(native, "extension", None)
    assert digest_sum(range(100)) == before
