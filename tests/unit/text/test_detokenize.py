from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from polyphase.text import IncrementalDetokenizer, Tokenizer

TEXTS = st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("  the dog. é日本🙂👨‍👩‍👧")), max_size=40)


def pieces_of(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """`ids` in pieces of the given sizes, over and over."""
    out, start, turn = [], 0, 0
    while start < len(ids):
        size = sizes[turn % len(sizes)]
        out.append(ids[start : start + size])
        start, turn = start + size, turn + 1
    return out


def run(tokenizer: Tokenizer, pushes: list[list[int]], context: list[int] | None = None, skip: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, context or (), skip)
    return [*[detokenizer.push(ids) for ids in pushes], detokenizer.flush()]


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(deadline=None)
@given(text=TEXTS, sizes=SIZES, form=st.sampled_from(["byte-level", "metaspace", "byte-fallback"]))
def test_the_pieces_of_an_encoded_text_join_to_its_decoding(
    tokenizers_by_form: dict[str, Tokenizer], text: str, sizes: list[int], form: str
) -> None:
    tokenizer = tokenizers_by_form[form]
    ids = tokenizer.encode(text)
    assert "".join(run(tokenizer, pieces_of(ids, sizes))) == tokenizer.decode(ids)


@settings(deadline=None)
@given(data=st.data(), sizes=SIZES, form=st.sampled_from(["byte-level", "metaspace"]), skip=st.booleans())
def test_the_pieces_of_any_ids_join_to_their_decoding(
    tokenizers_by_form: dict[str, Tokenizer], data: st.DataObject, sizes: list[int], form: str, skip: bool
) -> None:
    """Ids in any order: broken characters, special tokens, ids that the tokenizer does not know."""
    tokenizer = tokenizers_by_form[form]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=60))
    assert "".join(run(tokenizer, pieces_of(ids, sizes), skip=skip)) == tokenizer.decode(ids, skip)


@settings(deadline=None)
@given(head=TEXTS, tail=TEXTS, form=st.sampled_from(["byte-level", "metaspace", "byte-fallback"]))
def test_text_after_a_context_is_what_decoding_both_adds(tokenizers_by_form: dict[str, Tokenizer], head: str, tail: str, form: str) -> None:
    tokenizer = tokenizers_by_form[form]
    context, ids = tokenizer.encode("so " + head + "."), tokenizer.encode(tail)
    before = tokenizer.decode(context)
    both = tokenizer.decode(context + ids)
    assert before + "".join(run(tokenizer, [[i] for i in ids], context)) == both


@settings(deadline=None)
@given(text=TEXTS, form=st.sampled_from(["byte-level", "byte-fallback"]))
def test_half_a_character_is_never_shown(tokenizers_by_form: dict[str, Tokenizer], text: str, form: str) -> None:
    tokenizer = tokenizers_by_form[form]
    text = text.replace("\ufffd", "")
    assert all("\ufffd" not in piece for piece in run(tokenizer, [[i] for i in tokenizer.encode(text)]))


def test_a_character_appears_with_its_last_byte(tokenizers_by_form: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_form["byte-fallback"]
    ids = [2 + byte for byte in "é🙂".encode()]
    assert run(tokenizer, [[i] for i in ids]) == ["", "é", "", "", "", "🙂", ""]


def test_invalid_bytes_are_not_held_for_ever(tokenizers_by_form: dict[str, Tokenizer]) -> None:
    for form in ("byte-level", "byte-fallback"):
        tokenizer = tokenizers_by_form[form]
        lead = 2 + 0xE2 if form == "byte-fallback" else tokenizer.token_id("â")
        assert lead is not None
        shown = run(tokenizer, [[lead]] * 500)
        assert all(shown[1:]), f"{form} held an invalid byte back"
        assert "".join(shown) == "\ufffd" * 500


def test_a_replacement_character_of_the_text_itself_is_shown(tokenizers_by_form: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_form["byte-level"]
    assert "".join(run(tokenizer, [[i] for i in tokenizer.encode("a\ufffd")])[:-1]) == "a\ufffd"


def test_special_tokens_between_words_do_not_eat_the_space(tokenizers_by_form: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_form["metaspace"]
    end = tokenizer.token_id("<|end|>")
    assert end is not None
    dog = tokenizer.encode("dog")
    assert "".join(run(tokenizer, [dog, *[[end]] * 40, dog])) == "dog dog"


def test_the_window_stays_short(tokenizers_by_form: dict[str, Tokenizer]) -> None:
    """The cost of a token must not grow with the text before it."""
    tokenizer = tokenizers_by_form["metaspace"]
    detokenizer = IncrementalDetokenizer(tokenizer)
    ids = tokenizer.encode("the lazy dog said so " * 200)
    for token_id in ids:
        detokenizer.push([token_id])
        assert len(detokenizer._stream._window) <= 17  # type: ignore[union-attr]
