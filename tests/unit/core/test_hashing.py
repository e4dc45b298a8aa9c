"""Block and sequence hashes: the recipe, and the extension against the Python code and the `xxhash` package."""

from __future__ import annotations

import random
from array import array

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from polyphase.core import native
from polyphase.core.hashing import (
    MediaSpan,
    block_hashes,
    hash_tokens,
    namespace_of,
    python_block_hashes,
    python_sequence_hashes,
    sequence_hashes,
)
from polyphase.core.ids import SequenceHash

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=70)


def test_the_recipe_is_written_down():
    tokens = list(range(1, 9))
    packed = array("I", tokens).tobytes()
    blocks = [xxhash.xxh3_64_intdigest(packed[:16], 1337), xxhash.xxh3_64_intdigest(packed[16:], 1337)]
    assert block_hashes(tokens, 4) == blocks
    chained = xxhash.xxh3_64_intdigest(array("Q", blocks).tobytes(), 1337)
    assert sequence_hashes(tokens, 4) == [blocks[0], chained]


@given(TOKENS, st.integers(1, 40), st.text(max_size=3), st.none() | st.integers(0, 2**64 - 1).map(SequenceHash))
def test_one_call_gives_both_and_equals_python(tokens: list[int], block_size: int, salt: str, parent: SequenceHash | None):
    hashes = hash_tokens(tokens, block_size, salt, parent)
    assert hashes.blocks == block_hashes(tokens, block_size, salt) == python_block_hashes(tokens, block_size, salt)
    assert hashes.sequences == sequence_hashes(tokens, block_size, salt, parent)
    assert hashes.sequences == python_sequence_hashes(tokens, block_size, salt, parent)
    assert len(hashes.blocks) == len(hashes.sequences) == len(tokens) // block_size


@given(TOKENS, st.integers(0, 60), st.integers(1, 8))
def test_a_chain_goes_on_where_it_ended(tokens: list[int], cut: int, block_size: int):
    cut -= cut % block_size
    whole = sequence_hashes(tokens, block_size)
    head = sequence_hashes(tokens[:cut], block_size)
    assert head + sequence_hashes(tokens[cut:], block_size, parent=head[-1] if head else None) == whole


def test_a_salt_changes_everything():
    tokens = list(range(64))
    assert not set(block_hashes(tokens, 16)) & set(block_hashes(tokens, 16, "tenant"))
    assert not set(sequence_hashes(tokens, 16)) & set(sequence_hashes(tokens, 16, "tenant"))
    assert block_hashes(tokens, 16, "") == block_hashes(tokens, 16)


@pytest.mark.parametrize("kind", ["I", "i", "q", "Q", "H"])
def test_buffers_hash_like_lists(kind: str):
    tokens = [random.Random(7).randrange(2**15) for _ in range(333)]
    expected = sequence_hashes(tokens, 16)
    assert sequence_hashes(array(kind, tokens), 16) == expected
    assert sequence_hashes(memoryview(array(kind, tokens)), 16) == expected
    assert sequence_hashes(memoryview(array(kind, tokens))[16:], 16) == sequence_hashes(tokens[16:], 16)
    assert sequence_hashes(tuple(tokens), 16) == expected
    assert sequence_hashes(memoryview(array(kind, tokens))[::2], 16) == sequence_hashes(tokens[::2], 16)  # not contiguous


def test_numpy_arrays_hash_like_lists():
    numpy = pytest.importorskip("numpy")
    tokens = [random.Random(7).randrange(2**31) for _ in range(100)]
    for kind in ("int32", "uint32", "int64"):
        assert sequence_hashes(numpy.array(tokens, dtype=kind), 16) == sequence_hashes(tokens, 16)


@pytest.mark.parametrize("wrong", [[1, -1], [1, 2**32], array("i", [1, -1]), [2**70, 1]])
def test_a_token_id_that_does_not_fit_is_refused(wrong: list[int]):
    for call in (block_hashes, sequence_hashes, hash_tokens, python_block_hashes):
        with pytest.raises(OverflowError):
            call(wrong, 2)


@pytest.mark.parametrize("wrong", [[1, "2"], [1, 2.0], [1, None], 5])
def test_what_is_no_token_id_is_refused(wrong: list[int]):
    for call in (block_hashes, sequence_hashes, hash_tokens, python_block_hashes):
        with pytest.raises(TypeError):
            call(wrong, 2)


@pytest.mark.parametrize("block_size", [0, -1])
def test_a_block_has_tokens(block_size: int):
    for call in (block_hashes, sequence_hashes, hash_tokens):
        with pytest.raises(ValueError, match="at least one token"):
            call([1, 2], block_size)


def test_without_the_extension_nothing_changes(monkeypatch: pytest.MonkeyPatch):
    tokens = [random.Random(3).randrange(2**32) for _ in range(500)]
    before = hash_tokens(tokens, 16, "salt", SequenceHash(5))
    media = [MediaSpan(20, 40, 7)]
    with_media = hash_tokens(tokens, 16, media=media)
    monkeypatch.setattr(native, "extension", None)
    assert hash_tokens(tokens, 16, media=media) == with_media
    assert hash_tokens(tokens, 16, "salt", SequenceHash(5)) == before
    assert (block_hashes(tokens, 16, "salt"), sequence_hashes(tokens, 16, "salt", SequenceHash(5))) == (before.blocks, before.sequences)


SPANS = st.lists(st.builds(MediaSpan, st.integers(0, 80), st.integers(1, 30), st.integers(0, 2**64 - 1)), max_size=4)


@given(TOKENS, st.integers(1, 20), SPANS)
def test_media_change_the_blocks_they_lie_in_and_all_sequences_behind(tokens: list[int], block_size: int, spans: list[MediaSpan]):
    plain, found = hash_tokens(tokens, block_size), hash_tokens(tokens, block_size, media=spans)
    assert found.blocks == python_block_hashes(tokens, block_size, media=spans)
    assert hash_tokens(tokens, block_size, media=spans[::-1]) == found
    touched = {place // block_size for span in spans for place in range(span.start, span.start + span.token_count)}
    assert [before != after for before, after in zip(plain.blocks, found.blocks, strict=True)] == [
        block in touched for block in range(len(plain.blocks))
    ]
    first = min(touched, default=len(tokens))
    assert plain.sequences[:first] == found.sequences[:first]
    assert not set(plain.sequences[first:]) & set(found.sequences[first:])


def test_the_recipe_for_media_is_written_down():
    packed = array("I", [1, 2, 3, 4]).tobytes() + array("Q", [5, 9]).tobytes()
    spans = [MediaSpan(3, 1, 9), MediaSpan(0, 2, 5)]
    assert hash_tokens([1, 2, 3, 4], 4, media=spans).blocks == [xxhash.xxh3_64_intdigest(packed, 1337)]


@pytest.mark.parametrize("span", [MediaSpan(-1, 3, 0), MediaSpan(0, 0, 0), MediaSpan(0, 1, 2**64)])
def test_media_that_are_none_are_refused(span: MediaSpan):
    with pytest.raises(ValueError, match="no part of a prompt"):
        hash_tokens([1, 2, 3, 4], 2, media=[span])


def test_tenants_and_adapters_have_namespaces_of_their_own():
    assert namespace_of() is namespace_of("", "") is None
    assert namespace_of("tenant") == "tenant"
    names = [namespace_of(salt, lora) for salt in (None, "a", "a:b", "b") for lora in (None, "a", "b", "a:b")]
    assert len(set(names)) == len(names)
