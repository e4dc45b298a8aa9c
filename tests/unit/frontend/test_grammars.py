"""Structured output at the front door: every form that clients have for it, what is refused and why, and who gets such requests."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import msgspec
import pytest

from polyphase.core.errors import InvalidRequest, Overloaded
from polyphase.frontend.grammar_checks import MAX_WAITING, GrammarChecks
from polyphase.frontend.grammars import GrammarWish
from polyphase.frontend.models import ServedModel
from polyphase.wire.cards import ModelCard, Role
from polyphase.wire.requests import Grammar, GrammarKind

from .fake_worker import FakeWorker
from .stack import Stack, wait_for
from .test_bad_input import CHAT, TEXT, USER, checked

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
NAMED = {"name": "thing", "schema": SCHEMA}


def as_text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


@pytest.fixture
def able(card: ModelCard) -> ModelCard:
    return msgspec.structs.replace(card, takes_grammars=True)


def taken(worker: FakeWorker) -> Grammar | None:
    return worker.submits[-1].grammar


FORMS: list[tuple[dict[str, Any], Grammar | None]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": None}, None),
    ({"response_format": {"type": "json_object"}}, Grammar(GrammarKind.JSON, "")),
    ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, Grammar(GrammarKind.JSON_SCHEMA, as_text(SCHEMA))),
    (
        {"response_format": {"type": "json_schema", "json_schema": {**NAMED, "strict": True, "description": "x"}}},
        Grammar(GrammarKind.JSON_SCHEMA, as_text(SCHEMA)),
    ),
    ({"structured_outputs": {"json": SCHEMA}}, Grammar(GrammarKind.JSON_SCHEMA, as_text(SCHEMA))),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, Grammar(GrammarKind.JSON_SCHEMA, as_text(SCHEMA))),
    ({"structured_outputs": {"regex": "[0-9]+"}}, Grammar(GrammarKind.REGEX, "[0-9]+")),
    ({"structured_outputs": {"choice": ["yes", "nö"]}}, Grammar(GrammarKind.CHOICE, '["yes","nö"]')),
    ({"structured_outputs": {"grammar": 'root ::= "a"'}}, Grammar(GrammarKind.EBNF, 'root ::= "a"')),
    ({"structured_outputs": {"json_object": True, "disable_any_whitespace": False}}, Grammar(GrammarKind.JSON, "")),
    ({"guided_json": True}, Grammar(GrammarKind.JSON_SCHEMA, "true")),
    ({"guided_json": SCHEMA, "guided_regex": None}, Grammar(GrammarKind.JSON_SCHEMA, as_text(SCHEMA))),
    ({"guided_regex": "a|b"}, Grammar(GrammarKind.REGEX, "a|b")),
    ({"guided_choice": ["a"]}, Grammar(GrammarKind.CHOICE, '["a"]')),
    ({"guided_grammar": 'start: "a"'}, Grammar(GrammarKind.EBNF, 'start: "a"')),
]


@pytest.mark.parametrize(("fields", "grammar"), FORMS, ids=[json.dumps(fields)[:70] for fields, _ in FORMS])
async def test_every_form_reaches_the_worker(stack: Stack, able: ModelCard, fields: dict[str, Any], grammar: Grammar | None) -> None:
    worker = await stack.add("worker-0", card=able)
    for path, body in ((CHAT, {"messages": [USER]}), (TEXT, {"prompt": "hi"})):
        answer = await stack.post(path, {"model": "tiny", "max_tokens": 3, **body, **fields})
        assert answer.status_code == 200, answer.text
        assert taken(worker) == grammar


def schema_of(schema: Any, **more: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, **more}}}


SCHEMA_PARAM = "response_format.json_schema.schema"
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "yaml"}}, "response_format.type", "text, json_object or json_schema"),
    ({"response_format": {}}, "response_format.type", "required"),
    ({"response_format": "json"}, "response_format", "must be an object"),
    ({"response_format": {"type": "json_object", "json_schema": NAMED}}, "response_format.type", "needs the type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name", "required"),
    (schema_of({}, name="a b"), "response_format.json_schema.name", "letters"),
    (schema_of(None), SCHEMA_PARAM, "required"),
    (schema_of([]), SCHEMA_PARAM, "must be"),
    (schema_of({"type": "objekt"}), SCHEMA_PARAM, "objekt"),
    (schema_of({"type": 5}), SCHEMA_PARAM, "type must be a string"),
    (schema_of({"type": "object", "required": 5}), SCHEMA_PARAM, "required"),
    (schema_of({"type": "array", "uniqueItems": True}), SCHEMA_PARAM, "uniqueItems"),
    (schema_of({"type": "string", "pattern": "(("}), SCHEMA_PARAM, "unclosed group"),
    (schema_of({"type": "string", "pattern": "(?=a)b"}), SCHEMA_PARAM, "look-around"),
    (schema_of({"type": "string", "format": "strange"}), SCHEMA_PARAM, "strange"),
    (schema_of({"$ref": "#/$defs/nowhere"}), SCHEMA_PARAM, "nowhere"),
    (schema_of({"$ref": "https://example.org/schema.json"}), SCHEMA_PARAM, "example.org"),
    (schema_of({"$ref": "#"}), SCHEMA_PARAM, ""),
    (schema_of({"type": "integer", "minimum": 3, "maximum": 2}), SCHEMA_PARAM, "Unsatisfiable"),
    (schema_of({"enum": ["x" * 70_000]}), SCHEMA_PARAM, "65,536"),
    ({"guided_json": "{"}, "guided_json", "not JSON"),
    ({"guided_json": "5"}, "guided_json", "must be a JSON schema"),
    ({"guided_choice": []}, "guided_choice", "1 to 1000"),
    ({"guided_choice": ["a", ""]}, "guided_choice", "guided_choice[1] is empty"),
    ({"guided_choice": ["a"] * 1001}, "guided_choice", "not 1001"),
    ({"guided_choice": "a"}, "guided_choice", "must be an array"),
    ({"guided_regex": ""}, "guided_regex", "empty"),
    ({"guided_regex": "(("}, "guided_regex", "unclosed group"),
    ({"guided_grammar": "root ::= nothing"}, "guided_grammar", "nothing"),
    ({"structured_outputs": {}}, "structured_outputs", "needs one of"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", "only one"),
    ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern", "not supported"),
    ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "unknown field"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "only one"),
    ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend", "not supported"),
]


@pytest.mark.parametrize(("fields", "param", "said"), WRONG, ids=[json.dumps(fields)[:80] for fields, _, _ in WRONG])
async def test_what_is_wrong_is_named(stack: Stack, able: ModelCard, fields: dict[str, Any], param: str, said: str) -> None:
    worker = await stack.add("worker-0", card=able)
    message = checked(await stack.post(CHAT, {"model": "tiny", "messages": [USER], **fields}), 400, param)
    assert said in message
    assert not worker.submits


def deep(levels: int) -> Any:
    made: Any = {"type": "string"}
    for _ in range(levels):
        made = {"type": "array", "items": made}
    return made


BOMBS: dict[str, dict[str, Any]] = {
    "intersections of patterns": schema_of({"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}.*"} for i in range(30)]}),
    "a large multiple": schema_of({"type": "integer", "multipleOf": 99_999_989}),
    "a complement": {"guided_grammar": "start: A\nA: /(.*a.{20}){1,20}/ & ~/(.*b.{20}.*){1,20}/"},
    "depth": schema_of(deep(400)),
    "rules in a chain": {"guided_grammar": "start: a0\n" + "".join(f'a{i}:"x" a{i + 1}\n' for i in range(3300)) + 'a3300: "z"'},
}


@pytest.mark.parametrize("fields", BOMBS.values(), ids=BOMBS)
async def test_a_bomb_hurts_nobody(stack: Stack, able: ModelCard, fields: dict[str, Any]) -> None:
    """It is refused (or found harmless) within its CPU time, while others are served; and the next grammar is checked as ever."""
    await stack.add("worker-0", card=able)
    bomb = asyncio.create_task(stack.post(CHAT, {"model": "tiny", "messages": [USER], "max_tokens": 3, **fields}))
    await asyncio.sleep(0)
    for _ in range(3):
        assert (await stack.post(CHAT, {"model": "tiny", "messages": [USER], "max_tokens": 3})).status_code == 200
    answer = await bomb
    if answer.status_code != 200:
        checked(answer, 400, answer.json()["error"]["param"])
    after = await stack.post(TEXT, {"model": "tiny", "prompt": "x", "max_tokens": 3, "guided_regex": "a+"})
    assert after.status_code == 200, after.text


class TestChecks:
    """The process beside the frontend, by itself."""

    def wish(self, text: str = "a+") -> GrammarWish:
        return GrammarWish(Grammar(GrammarKind.REGEX, text), "guided_regex")

    async def test_it_is_started_when_it_is_needed_and_asked_once(self, model: ServedModel) -> None:
        checks = GrammarChecks(1.0)
        try:
            assert checks._checker._process is None
            await checks.check(self.wish(), model)
            process = checks._checker._process
            assert process is not None
            process.kill()
            process.wait()
            await checks.check(self.wish(), model)
            assert checks._checker._process is process, "the verdict was known"
            with pytest.raises(InvalidRequest, match="unclosed"):
                await checks.check(self.wish("("), model)
            assert checks._checker._process is not process, "started again"
        finally:
            checks.close()

    async def test_it_takes_the_time_limit_for_a_verdict_and_keeps_it(self, model: ServedModel) -> None:
        checks = GrammarChecks(0.2)
        bomb = GrammarWish(Grammar(GrammarKind.JSON_SCHEMA, '{"type":"integer","multipleOf":99999989}'), "guided_json")
        try:
            for _ in range(2):
                with pytest.raises(InvalidRequest, match=r"guided_json: it takes more than 0\.2 s of CPU time"):
                    await checks.check(bomb, model)
            assert checks._checker._process is not None
            assert checks._checker._process.poll() is not None, "not started for what is known"
        finally:
            checks.close()

    async def test_a_process_that_says_nothing_is_given_up(self, model: ServedModel) -> None:
        mute = (sys.executable, "-c", "import sys; sys.stdin.read()")
        checks = GrammarChecks(1.0, mute, answer_timeout_s=0.05)
        try:
            with pytest.raises(Overloaded):
                await checks.check(self.wish(), model)
        finally:
            checks.close()

    async def test_a_process_that_cannot_start_is_no_fault_of_the_client(self, model: ServedModel) -> None:
        checks = GrammarChecks(1.0, (sys.executable, "-c", "raise SystemExit(3)"))
        try:
            with pytest.raises(RuntimeError, match="exit code 3"):
                await checks.check(self.wish(), model)
        finally:
            checks.close()

    async def test_only_so_many_wait(self, model: ServedModel) -> None:
        checks = GrammarChecks(1.0, (sys.executable, "-c", "import sys; sys.stdin.read()"))
        waiting = [asyncio.create_task(checks.check(self.wish(f"a{i}"), model)) for i in range(MAX_WAITING)]
        try:
            await wait_for(lambda: checks._waiting_count == MAX_WAITING)
            with pytest.raises(Overloaded):
                await checks.check(self.wish("b"), model)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await asyncio.to_thread(checks.close)


class TestWhoGetsIt:
    async def test_no_worker_has_it(self, stack: Stack) -> None:
        worker = await stack.add("worker-0")
        answer = await stack.post(CHAT, {"model": "tiny", "messages": [USER], "response_format": {"type": "json_object"}})
        message = checked(answer, 400, "response_format")
        assert message == "no worker of the model 'tiny' has structured output; leave response_format out"
        assert not worker.submits

    async def test_only_those_that_have_it_get_it(self, stack: Stack, able: ModelCard) -> None:
        plain, other = await stack.add("worker-0"), await stack.add("worker-1", card=able)
        for i in range(6):
            answer = await stack.post(TEXT, {"model": "tiny", "prompt": f"p{i}", "max_tokens": 3, "guided_regex": "a+"})
            assert answer.status_code == 200, answer.text
        assert (len(plain.submits), len(other.submits)) == (0, 6)

    async def test_it_moves_to_one_that_can_go_on_with_it(self, stack: Stack, able: ModelCard) -> None:
        first = await stack.add("worker-0", card=able)
        first.behaviour.fails_after = 2
        forgetful = await stack.add("worker-1", Role.PREFILL, card=msgspec.structs.replace(able, resumes_grammars=False))
        second = await stack.add("worker-2", Role.PREFILL, card=able)
        answer = await stack.post(TEXT, {"model": "tiny", "prompt": "x", "max_tokens": 6, "guided_regex": ".*", "return_token_ids": True})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["token_ids"] == stack.story[:6]
        assert not forgetful.submits
        assert [(len(submit.token_ids) - submit.prompt_token_count, submit.grammar) for submit in second.submits] == [
            (2, Grammar(GrammarKind.REGEX, ".*"))
        ]

    async def test_where_nobody_can_go_on_with_it_that_is_said(self, stack: Stack, able: ModelCard) -> None:
        forgetful = msgspec.structs.replace(able, resumes_grammars=False)
        for i in range(2):
            worker = await stack.add(f"worker-{i}", card=forgetful)
            worker.behaviour.fails_after = 2
        answer = await stack.post(TEXT, {"model": "tiny", "prompt": "x", "max_tokens": 6, "guided_regex": ".*"})
        assert answer.status_code >= 500
        assert "cannot go on with structured output that has begun elsewhere" in answer.json()["error"]["message"]
        assert sum(len(worker.submits) for worker in stack.workers.values()) == 1
        await wait_for(lambda: stack.is_at_rest)

    async def test_a_worker_that_drains_keeps_what_nobody_else_could_go_on_with(self, stack: Stack, able: ModelCard) -> None:
        forgetful = msgspec.structs.replace(able, resumes_grammars=False)
        worker = await stack.add("worker-0", card=forgetful)
        await stack.add("worker-1", Role.PREFILL, card=forgetful)
        worker.behaviour.gate = asyncio.Semaphore(2)
        task = asyncio.create_task(stack.post(TEXT, {"model": "tiny", "prompt": "x", "max_tokens": 6, "guided_regex": ".*"}))
        dispatcher = stack.services.dispatcher
        await wait_for(lambda: any(flight.emitted for flight in dispatcher._flights.values()))
        (flight,) = dispatcher._flights.values()
        assert dispatcher.ask_to_hand_over(flight.worker_id, flight.epoch, [flight.stage]) == 0
        assert dispatcher.worker_stalled(flight.worker_id, flight.epoch, "for the test") == 0
        for _ in range(10):
            worker.behaviour.gate.release()
        assert (await task).status_code == 200

    async def test_it_is_split_only_if_the_decode_worker_can_go_on(self, stack: Stack, able: ModelCard) -> None:
        prompt = list(range(5, 105))
        forgetful = msgspec.structs.replace(able, resumes_grammars=False)
        prefill = await stack.add("prefill-0", Role.PREFILL, card=able)
        await stack.add("decode-0", Role.DECODE, card=forgetful)
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "guided_regex": ".*", "return_token_ids": True}
        assert (await stack.post(TEXT, body)).json()["choices"][0]["token_ids"] == stack.story[:6]
        assert not prefill.submits
        await stack.add("decode-1", Role.DECODE, card=able)
        answer = await stack.post(TEXT, {**body, "prompt": prompt[::-1]})
        assert answer.headers["x-polyphase-route"] == "split"
        assert answer.headers["x-polyphase-decode-worker"] == "decode-1"
        assert prefill.submits[0].grammar is not None
