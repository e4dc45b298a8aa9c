"""The SGLang adapter against the contract of all engines, and against a server that misbehaves; the server is played from recordings."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from polyphase.engines.served.engine import ServedEngine
from polyphase.engines.served.kv_events import KvEventObserver
from polyphase.engines.served.polling import LoadPoll
from polyphase.engines.sglang import load
from polyphase.engines.sglang.dialect import GenerateDialect, Manners
from polyphase.engines.sglang.probe import ServerFacts, facts_of
from polyphase.testing.engines import EngineConformance, stepping
from polyphase.text import Tokenizer
from polyphase.wire.cards import ModelCard
from polyphase.wire.requests import FinishReason, Grammar, GrammarKind, SamplingParams, StopConditions, Submit
from tests.unit.sglang.double import CUMULATIVE, Recording, SglangDouble, serving
from tests.unit.vllm.double import EventsDouble
from tests.unit.vllm.test_engine import TOKENIZER

RECORDING = Recording()
UNTIL_CLEARED = next(place for place, batch in enumerate(RECORDING.batches) if place and b"AllBlocksCleared" in batch[-1])


def facts_in(recording: Recording) -> ServerFacts:
    pages = recording.pages
    return facts_of(pages["/server_info"], pages["/v1/models"]["data"], json.dumps(pages["/v1/loads"]).encode())


def card_of(facts: ServerFacts, **changes: Any) -> ModelCard:
    fields: dict[str, Any] = {
        "name": "tiny",
        "tokenizer_json": TOKENIZER.encode(),
        "chat_template": None,
        "bos_token": None,
        "eos_token": None,
        "bos_token_id": 0,
        "eos_token_ids": [1],
        "vocab_size": 4096,
        "context_length": facts.context_length,
        "block_size": facts.block_size,
        "block_count": facts.kv_tokens // facts.block_size,
        "max_batch_tokens": 2048,
        "max_running": 16,
        "can_hand_over": False,
        "resumes_sampling": False,
        "block_bytes": 0,
        "engine": "sglang",
    }
    return ModelCard(**{**fields, **changes})


def manners_of(facts: ServerFacts) -> Manners:
    return Manners(facts.takes_priority, facts.is_incremental, facts.is_deterministic, facts.takes_grammars, facts.mode, vocab_size=4096)


def engine_of(url: str, recording: Recording = RECORDING, events: EventsDouble | None = None, **changes: Any) -> ServedEngine:
    facts = facts_in(recording)
    observers: list[LoadPoll | KvEventObserver] = [LoadPoll("SGLang", load.PATH, load.gauges_of, 0.02)]
    if events is not None:
        observers.append(KvEventObserver(events.endpoint, events.replay_endpoint, "kv-events", facts.block_size))
    dialect = GenerateDialect(manners_of(facts))
    return ServedEngine(card_of(facts, **changes), Tokenizer.from_json(TOKENIZER.encode()), url, dialect, observers)


@pytest.fixture
async def events(tmp_path: Path) -> AsyncIterator[EventsDouble]:
    async with EventsDouble(tmp_path, RECORDING.batches[:UNTIL_CLEARED]) as double:
        yield double


@pytest.fixture
async def double() -> AsyncIterator[SglangDouble]:
    async with serving(SglangDouble(RECORDING)) as double:
        yield double


@pytest.fixture
def engine(double: SglangDouble, events: EventsDouble) -> ServedEngine:
    return engine_of(double.url, events=events)


@pytest.fixture
def grammar_engine(double: SglangDouble) -> ServedEngine:
    """Apart, since the conformance kit asks for structured output that was not recorded."""
    return engine_of(double.url, takes_grammars=True, resumes_grammars=False)


class TestIncremental(EngineConformance):
    pass


class TestCumulative(EngineConformance):
    """A server that somebody else started, whose streams grow."""

    @pytest.fixture
    async def engine(self, events: EventsDouble) -> AsyncIterator[ServedEngine]:
        recording = Recording(CUMULATIVE)
        assert not facts_in(recording).is_incremental
        async with serving(SglangDouble(recording)) as double:
            yield engine_of(double.url, recording, events)


def request(request_id: str, prompt: list[int] | None = None, max_tokens: int = 6, **fields: Any) -> Submit:
    prompt = prompt or list(range(100, 200))
    given = {"sampling": SamplingParams(seed=1, temperature=0.0), "stop": StopConditions(max_tokens=max_tokens, ignore_eos=True), **fields}
    return Submit(request_id=request_id, token_ids=prompt, prompt_token_count=len(prompt), **given)


SCHEMA = '{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": false}'
UNTIL_IT_ENDS = {"stop": StopConditions(max_tokens=24)}


async def test_what_is_sent_is_what_was_recorded(grammar_engine: ServedEngine, double: SglangDouble) -> None:
    """Sampling, salts and grammars as the real one took them."""
    engine = grammar_engine
    async with stepping(engine) as run:
        engine.submit(request("a", [10, 11, 12, 13, 14], sampling=SamplingParams(seed=7, temperature=0.8, top_k=20)))
        engine.submit(request("b", cache_salt="tenant-a"))
        engine.submit(request("c", [10, 11, 12], grammar=Grammar(GrammarKind.JSON_SCHEMA, SCHEMA), **UNTIL_IT_ENDS))
        engine.submit(request("d", [10, 11, 12], grammar=Grammar(GrammarKind.CHOICE, '["kabas?", "loden."]'), **UNTIL_IT_ENDS))
        ends = [await run.end(request_id) for request_id in "abcd"]
    assert not double.unrecorded
    assert all(end.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) for end in ends)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"grammar": Grammar(GrammarKind.JSON_SCHEMA, "{{"), **UNTIL_IT_ENDS}, "Failed to compile json grammar"),
        ({"lora": "unknown"}, "LoRA is not enabled"),
    ],
)
async def test_a_refusal_is_the_callers_fault_and_final(grammar_engine: ServedEngine, fields: dict[str, Any], said: str) -> None:
    engine = grammar_engine
    async with stepping(engine) as run:
        engine.submit(request("a", [10, 11, 12], **fields))
        end = await run.end("a")
    assert (end.finish_reason, end.token_ids) == (FinishReason.ERROR, []), "a token that came with it was never computed"
    assert end.failure is not None
    assert (end.failure.code, end.failure.is_retryable) == ("invalid_value", False)
    assert said in end.failure.message


async def test_a_token_beyond_the_vocabulary_does_not_reach_it(engine: ServedEngine, double: SglangDouble) -> None:
    """It would end the real one."""
    async with stepping(engine) as run:
        engine.submit(request("a", [10, 99999]))
        end = await run.end("a")
    assert end.failure is not None
    assert not end.failure.is_retryable
    assert not double.bodies


@pytest.mark.parametrize(
    ("manner", "said"),
    [
        ("cut", "the connection to sglang broke"),
        ("mute", "sglang ended its answer after 3 tokens without saying why"),
        ("die", "sglang broke the request off: the scheduler gave it up"),
    ],
)
async def test_what_breaks_off_can_go_on_elsewhere(engine: ServedEngine, manner: str, said: str) -> None:
    async with stepping(engine) as run:
        engine.submit(request(f"{manner}-a", max_tokens=40))
        end = await run.end(f"{manner}-a")
    assert end.failure is not None
    assert said in end.failure.message
    assert end.failure.is_retryable
    assert len(run.tokens(f"{manner}-a")) == 3, "what came before is not lost"


async def test_what_somebody_else_aborted_goes_on_elsewhere(engine: ServedEngine) -> None:
    async with stepping(engine) as run:
        engine.submit(request("a", list(range(300, 340)), max_tokens=2000))
        end = await run.end("a")
    assert end.failure is not None
    assert end.failure.is_retryable
    assert run.tokens("a")


async def test_an_abort_is_said_by_name(engine: ServedEngine, double: SglangDouble) -> None:
    """SGLang sees a closed connection two seconds later."""
    async with stepping(engine) as run:
        engine.submit(request("hang-a", max_tokens=40))
        await run.until(lambda: len(run.tokens("hang-a")) == 3, "three tokens")
        engine.abort("hang-a")
        assert (await run.end("hang-a")).finish_reason is FinishReason.CANCELLED
        await asyncio.wait_for(double.was_aborted.wait(), 30)
        engine.submit(request("b"))
        await run.end("b")
    assert double.aborted == ["hang-a"], "who has his answer is not aborted"


async def test_a_server_that_hangs_makes_no_steps(engine: ServedEngine) -> None:
    """Its load goes on being answered; frontends see the worker stand still."""
    async with stepping(engine) as run:
        engine.submit(request("hang-a", max_tokens=40))
        await run.until(lambda: len(run.tokens("hang-a")) == 3, "three tokens")
        await asyncio.sleep(0.1)
        step = engine.load().step
        await asyncio.sleep(0.2)  # ten looks at the load
        found = engine.load()
        assert (found.step, found.running_count) == (step, 1)


async def test_the_key_goes_with_everything() -> None:
    async with serving(SglangDouble(RECORDING, api_key="secret")) as double:
        engine = engine_of(double.url)
        async with stepping(engine) as run:
            engine.submit(request("a"))
            end = await run.end("a")
        assert end.failure is not None
        assert "Unauthorized" in end.failure.message
        facts = facts_in(RECORDING)
        dialect, text = GenerateDialect(manners_of(facts)), Tokenizer.from_json(TOKENIZER.encode())
        engine = ServedEngine(card_of(facts), text, double.url, dialect, headers={"authorization": "Bearer secret"})
        async with stepping(engine) as run:
            engine.submit(request("a"))
            assert (await run.end("a")).finish_reason is FinishReason.LENGTH


async def test_a_server_that_has_gone_ends_the_engine() -> None:
    async with serving(SglangDouble(RECORDING)) as double:
        engine = engine_of(double.url)
    with pytest.raises(Exception, match="cannot be reached any more"):
        await asyncio.wait_for(engine.run(lambda report: None), 60)


async def test_the_double_knows_only_what_was_recorded(double: SglangDouble) -> None:
    async with httpx.AsyncClient(base_url=double.url) as client:
        answer = await client.post("/generate", json={"input_ids": [1], "surprise": True, "sampling_params": {"max_new_tokens": 1}})
    assert answer.status_code == 400
