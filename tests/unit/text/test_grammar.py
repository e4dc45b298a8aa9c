"""Grammars over tokenizers of all forms: a text that fits passes token by token, and what is allowed is what fits."""

from __future__ import annotations

import json
from typing import Any

import pytest

from polyphase.core.errors import ConfigurationError, InvalidRequest
from polyphase.text import GrammarMatcher, GrammarVocabulary, Tokenizer
from polyphase.wire.requests import Grammar, GrammarKind

ANY = Grammar(GrammarKind.JSON, "")
EXAMPLE = {"name": "Größe 🙂", "list": [1, 2.5, True, None], "nested": {"a": {"b": [{}]}}}
EOS = 1
UNKNOWN = 3  # rows of the output layer without a piece


def regex(text: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, text)


@pytest.fixture
def tokenizer(tokenizers_by_form: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers_by_form["byte-level"]


@pytest.fixture
def vocabulary(tokenizer: Tokenizer) -> GrammarVocabulary:
    return GrammarVocabulary(tokenizer, tokenizer.vocab_size + UNKNOWN, [EOS])


def follow(matcher: GrammarMatcher, ids: list[int]) -> None:
    for token in ids:
        allowed = matcher.allowed()
        assert allowed[token]
        assert not allowed[EOS]
        assert not any(allowed[-UNKNOWN:]), "ids without a piece are never allowed"
        assert matcher.accept([token])


FORMS: list[dict[str, Any]] = [
    {"ensure_ascii": False},
    {"ensure_ascii": False, "indent": 4},
    {"ensure_ascii": False, "separators": (",", ":")},
]


@pytest.mark.parametrize("form", FORMS, ids=["usual", "indented", "compact"])
def test_json_as_people_write_it(vocabulary: GrammarVocabulary, tokenizer: Tokenizer, form: dict[str, Any]) -> None:
    matcher = vocabulary.start(ANY)
    follow(matcher, tokenizer.encode(json.dumps(EXAMPLE, **form)))
    assert matcher.is_complete


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback", "metaspace"])
def test_tokenizers_of_every_form(tokenizers_by_form: dict[str, Tokenizer], name: str) -> None:
    """The text is forced, so the library asks how the model would write it; some would put a space in front."""
    tokenizer = tokenizers_by_form[name]
    matcher = GrammarVocabulary(tokenizer, tokenizer.vocab_size + UNKNOWN, [EOS]).start(regex("the lazy dog[.]"))
    said = b""
    while not matcher.is_complete:
        allowed = matcher.allowed()
        token = next(i for i in range(tokenizer.vocab_size) if allowed[i])
        said += tokenizer.token_bytes(token) or b""
        assert matcher.accept([token]), matcher.failure
    assert said == b"the lazy dog."


def test_spaces_do_not_go_on_for_ever(vocabulary: GrammarVocabulary, tokenizer: Tokenizer) -> None:
    (space,) = tokenizer.encode(" ")
    opened = [*tokenizer.encode("{"), space]
    bounded, wild = vocabulary.start(ANY), vocabulary.start(ANY, any_whitespace=True)
    assert bounded.accept(opened)
    assert wild.accept(opened)
    assert (bool(bounded.allowed()[space]), bool(wild.allowed()[space])) == (False, True)


def test_eos_only_where_it_may_end(tokenizer: Tokenizer) -> None:
    matcher = GrammarVocabulary(tokenizer, tokenizer.vocab_size, [EOS, 2]).start(regex("ab*"))
    assert not matcher.allowed()[EOS]
    assert matcher.accept(tokenizer.encode("a"))
    assert matcher.allowed()[EOS]
    assert matcher.allowed()[2]
    assert not matcher.is_complete
    assert matcher.accept([EOS])
    assert matcher.is_complete


def test_a_copy_goes_its_own_way(vocabulary: GrammarVocabulary, tokenizer: Tokenizer) -> None:
    first = vocabulary.start(regex("ax|bx"))
    second = first.copy()
    assert first.accept(tokenizer.encode("a"))
    assert second.accept(tokenizer.encode("b"))
    assert first.allowed() == second.allowed()


def test_what_does_not_fit_sticks(vocabulary: GrammarVocabulary, tokenizer: Tokenizer) -> None:
    matcher = vocabulary.start(regex("a"))
    assert matcher.failure is None
    assert not matcher.accept(tokenizer.encode("b"))
    assert matcher.failure is not None
    assert "doesn't satisfy the grammar" in matcher.failure
    assert "\n" not in matcher.failure
    assert not matcher.is_complete


def test_choices_are_taken_word_for_word(vocabulary: GrammarVocabulary, tokenizer: Tokenizer) -> None:
    choices = ['say "hi"', "back\\slash", "new\nline", "größer 🙂", "a.*", "x"]
    for choice in choices:
        matcher = vocabulary.start(Grammar(GrammarKind.CHOICE, json.dumps(choices)))
        follow(matcher, tokenizer.encode(choice))
        assert matcher.is_complete


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (Grammar(GrammarKind.JSON_SCHEMA, "false"), "nothing fits"),
        (Grammar(GrammarKind.JSON_SCHEMA, "5"), "."),
        (Grammar(GrammarKind.JSON_SCHEMA, "{"), "."),
        (Grammar(GrammarKind.REGEX, "("), "unclosed group"),
        (Grammar(GrammarKind.EBNF, "hello"), "GBNF"),
    ],
)
def test_what_is_no_grammar(vocabulary: GrammarVocabulary, grammar: Grammar, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        vocabulary.start(grammar)


def test_a_model_without_an_end(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigurationError, match="no end-of-sequence token"):
        GrammarVocabulary(tokenizer, tokenizer.vocab_size, [])
