"""Structured output in vLLM's words, as the real one (0.32.0) took them, and what it cannot do."""

from __future__ import annotations

import json

import msgspec
import pytest

from polyphase.core.errors import InvalidRequest
from polyphase.engines.served.engine import ServedEngine
from polyphase.engines.vllm.dialects import dialect_of
from polyphase.engines.vllm.probe import ServerFacts
from polyphase.text import Tokenizer
from polyphase.wire.requests import Grammar, GrammarKind
from tests.unit.vllm.test_engine import TOKENIZER, card_of_recording, request

FORMS = [
    (Grammar(GrammarKind.JSON, ""), {"json_object": True}),
    (Grammar(GrammarKind.JSON_SCHEMA, '{"type":"object"}'), {"json": '{"type":"object"}'}),
    (Grammar(GrammarKind.REGEX, "[0-9]+"), {"regex": "[0-9]+"}),
    (Grammar(GrammarKind.CHOICE, '["yes","nö"]'), {"choice": ["yes", "nö"]}),
    (Grammar(GrammarKind.EBNF, 'root ::= "a"'), {"grammar": 'root ::= "a"'}),
]


@pytest.mark.parametrize(("grammar", "expected"), FORMS, ids=[grammar.kind for grammar, _ in FORMS])
def test_both_ways_to_ask(grammar: Grammar, expected: dict[str, object]):
    asked = request("a", grammar=grammar)
    generate = json.loads(dialect_of("tiny", has_generate=True, takes_priority=True).body(asked, 6))
    assert generate["sampling_params"]["structured_outputs"] == expected
    completions = json.loads(dialect_of("tiny", has_generate=False, takes_priority=True).body(asked, 6))
    assert completions["structured_outputs"] == expected


def test_a_free_request_says_nothing_of_it():
    assert b"structured_outputs" not in dialect_of("tiny", has_generate=True, takes_priority=True).body(request("a"), 6)


def test_what_began_elsewhere_is_refused():
    card = msgspec.structs.replace(card_of_recording(), takes_grammars=True, resumes_grammars=False)
    dialect = dialect_of("tiny", has_generate=True, takes_priority=True)
    engine = ServedEngine(card, Tokenizer.from_json(TOKENIZER.encode()), "http://127.0.0.1:9", dialect)
    begun = msgspec.structs.replace(request("a", grammar=FORMS[2][0]), prompt_token_count=98)
    with pytest.raises(InvalidRequest, match="2 tokens were emitted elsewhere cannot go on at this engine"):
        engine.submit(begun)
    assert engine.load().running_count == engine.load().waiting_count == 0


@pytest.mark.parametrize(
    ("version", "has_generate", "expected"),
    [
        ("0.32.0", True, True),
        ("0.11.0", False, True),
        ("v0.12.1rc1", False, True),
        ("0.10.2", False, False),
        ("dev", False, False),
        ("dev", True, True),
    ],
)
def test_old_versions_would_ignore_it(version: str, has_generate: bool, expected: bool):
    facts = ServerFacts(version, "m", 1, 1, 1, has_generate, None, 1)
    assert facts.has_structured_outputs is expected
