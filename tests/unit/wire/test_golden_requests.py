"""Requests with a grammar as they go over the wire; as `test_golden_events`."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path
from typing import Any

import msgspec
import pytest

from polyphase.wire.cards import ModelCard
from polyphase.wire.requests import Grammar, GrammarKind, SamplingParams, StopConditions, Submit, ToWorker

GOLDEN = Path(__file__).parent / "golden"


def submit(grammar: Grammar | None) -> Submit:
    return Submit(
        request_id="r",
        token_ids=[1, 2, 3],
        prompt_token_count=2,
        sampling=SamplingParams(seed=7, temperature=0.0),
        stop=StopConditions(max_tokens=5),
        grammar=grammar,
    )


MESSAGES: dict[str, Submit] = {
    "submit_free": submit(None),
    "submit_json": submit(Grammar(GrammarKind.JSON, "")),
    "submit_schema": submit(Grammar(GrammarKind.JSON_SCHEMA, json.dumps({"type": "integer"}))),
    "submit_regex": submit(Grammar(GrammarKind.REGEX, "[0-9]+")),
    "submit_choice": submit(Grammar(GrammarKind.CHOICE, '["yes","nö"]')),
    "submit_ebnf": submit(Grammar(GrammarKind.EBNF, 'root ::= "a"')),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_are_what_they_were(name: str):
    message = MESSAGES[name]
    file = GOLDEN / f"{name}.hex"
    data = msgspec.msgpack.encode(message)
    if os.environ.get("POLYPHASE_WRITE_GOLDEN") == "1":
        file.write_text("\n".join(textwrap.wrap(data.hex(), 120)) + "\n")
    kept = bytes.fromhex(file.read_text())
    kind: Any = ToWorker
    assert data == kept
    assert msgspec.msgpack.decode(kept, type=kind) == message


def test_a_card_of_before_has_no_structured_output():
    numbers = ("vocab_size", "context_length", "block_size", "block_count", "max_batch_tokens", "max_running", "block_bytes")
    nothing = dict.fromkeys(("chat_template", "bos_token", "eos_token", "bos_token_id"))
    needed = {"type": "card", "name": "m", "tokenizer_json": "", "eos_token_ids": [], "can_hand_over": False, **nothing}
    needed |= dict.fromkeys(numbers, 1)
    assert not msgspec.json.decode(json.dumps(needed), type=ModelCard).takes_grammars
