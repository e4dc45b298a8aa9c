"""What the output has to be a sentence of, in the words of SGLang's sampling parameters. Source: SGLang 0.5.23."""

from __future__ import annotations

import json
import re

from polyphase.core.errors import InvalidRequest
from polyphase.wire.requests import Grammar, GrammarKind

_ANY_OBJECT = '{"type": "object"}'
_SPECIAL = re.compile(r"[\\^$.|?*+()\[\]{}/]")  # of the regular expressions of its backends, which know fewer escapes than Python's


def grammar_fields(grammar: Grammar) -> dict[str, str]:
    """Raises: InvalidRequest if a list of choices is none."""
    match grammar.kind:
        case GrammarKind.JSON:
            return {"json_schema": _ANY_OBJECT}
        case GrammarKind.JSON_SCHEMA:
            return {"json_schema": grammar.text}
        case GrammarKind.REGEX:
            return {"regex": grammar.text}
        case GrammarKind.EBNF:
            return {"ebnf": grammar.text}
        case GrammarKind.CHOICE:
            return {"regex": _one_of(grammar.text)}


def _one_of(text: str) -> str:
    try:
        choices = json.loads(text)
    except ValueError:
        choices = None
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise InvalidRequest("a choice is made from a JSON list of strings")
    return "(" + "|".join(_SPECIAL.sub(lambda found: "\\" + found[0], choice) for choice in choices) + ")"
