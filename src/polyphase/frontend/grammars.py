"""Structured output as clients ask for it, in one form: OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_…`.

Only the shape is looked at here; whether it is a grammar that can be followed is for `grammar_checks` to find out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from polyphase.core.errors import InvalidRequest
from polyphase.frontend.openai_types import GenerationRequest, ResponseFormat, StructuredOutputs
from polyphase.wire.requests import Grammar, GrammarKind

MAX_GRAMMAR_CHARS = 65_536
MAX_GRAMMAR_CHOICES = 1000
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # Source: OpenAI's API reference


@dataclass(frozen=True, slots=True)
class GrammarWish:
    """`param`: the field that says it, in the request's own words."""

    grammar: Grammar
    param: str


def grammar_wish(request: GenerationRequest) -> GrammarWish | None:
    """Raises: InvalidRequest."""
    wishes = [*_of_response_format(request.response_format), *_of_structured_outputs(request.structured_outputs), *_guided(request)]
    if len(wishes) > 1:
        names = " and ".join(wish.param for wish in wishes)
        raise InvalidRequest(f"only one of them can say what the output has to be: {names}", param=wishes[1].param)
    if not wishes:
        return None
    (wish,) = wishes
    if len(wish.grammar.text) > MAX_GRAMMAR_CHARS:
        raise InvalidRequest(
            f"{wish.param} has {len(wish.grammar.text):,} characters; at most {MAX_GRAMMAR_CHARS:,} are accepted", param=wish.param
        )
    return wish


def _of_response_format(wanted: ResponseFormat | None) -> Iterator[GrammarWish]:
    if wanted is None:
        return
    match wanted.type:
        case "text" | "json_object" if wanted.json_schema is not None:
            raise InvalidRequest(
                f"response_format.json_schema needs the type 'json_schema', not {wanted.type!r}", param="response_format.type"
            )
        case "text":
            return
        case "json_object":
            yield GrammarWish(Grammar(GrammarKind.JSON, ""), "response_format")
        case "json_schema":
            told = wanted.json_schema
            if told is None:
                raise InvalidRequest("the field 'response_format.json_schema' is required", param="response_format.json_schema")
            if not _NAME.fullmatch(told.name):
                raise InvalidRequest(
                    f"response_format.json_schema.name must have 1 to 64 letters, digits, _ or -, not {told.name[:100]!r}",
                    param="response_format.json_schema.name",
                )
            if told.schema is None:
                raise InvalidRequest(
                    "the field 'response_format.json_schema.schema' is required", param="response_format.json_schema.schema"
                )
            yield _schema(told.schema, "response_format.json_schema.schema")
        case other:
            raise InvalidRequest(
                f"response_format.type must be text, json_object or json_schema, not {other[:100]!r}", param="response_format.type"
            )


def _of_structured_outputs(wanted: StructuredOutputs | None) -> Iterator[GrammarWish]:
    if wanted is None:
        return
    for name in ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern", "structural_tag"):
        if getattr(wanted, name):
            raise InvalidRequest(f"structured_outputs.{name} is not supported", param=f"structured_outputs.{name}")
    wishes = [*_each(wanted.json, wanted.regex, wanted.choice, wanted.grammar, "structured_outputs.")]
    if wanted.json_object:
        wishes.append(GrammarWish(Grammar(GrammarKind.JSON, ""), "structured_outputs.json_object"))
    if not wishes:
        raise InvalidRequest("structured_outputs needs one of json, regex, choice, grammar, json_object", param="structured_outputs")
    yield from wishes


def _guided(request: GenerationRequest) -> Iterator[GrammarWish]:
    return _each(request.guided_json, request.guided_regex, request.guided_choice, request.guided_grammar, "guided_")


def _each(schema: Any, regex: str | None, choice: list[str] | None, grammar: str | None, prefix: str) -> Iterator[GrammarWish]:
    if schema is not None:
        yield _schema(schema, f"{prefix}json")
    if regex is not None:
        yield _text(GrammarKind.REGEX, regex, f"{prefix}regex")
    if choice is not None:
        yield _choice(choice, f"{prefix}choice")
    if grammar is not None:
        yield _text(GrammarKind.EBNF, grammar, f"{prefix}grammar")


def _schema(schema: Any, param: str) -> GrammarWish:
    """A schema as a JSON value, or, in vLLM's forms, as a text of JSON."""
    try:
        if isinstance(schema, str):
            schema = msgspec.json.decode(schema)
        if not isinstance(schema, dict | bool):
            raise InvalidRequest(f"{param} must be a JSON schema: an object, or true for anything", param=param)
        text = msgspec.json.encode(schema).decode()
    except RecursionError as error:
        raise InvalidRequest(f"{param} is nested too deeply", param=param) from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"{param} is not JSON: {error}", param=param) from error
    return GrammarWish(Grammar(GrammarKind.JSON_SCHEMA, text), param)


def _text(kind: GrammarKind, text: str, param: str) -> GrammarWish:
    if not text:
        raise InvalidRequest(f"{param} is empty", param=param)
    return GrammarWish(Grammar(kind, text), param)


def _choice(choices: list[str], param: str) -> GrammarWish:
    if not 1 <= len(choices) <= MAX_GRAMMAR_CHOICES:
        raise InvalidRequest(f"{param} must hold 1 to {MAX_GRAMMAR_CHOICES} strings, not {len(choices)}", param=param)
    if "" in choices:
        raise InvalidRequest(f"{param}[{choices.index('')}] is empty: an output has at least one token", param=param)
    return GrammarWish(Grammar(GrammarKind.CHOICE, msgspec.json.encode(choices).decode()), param)
