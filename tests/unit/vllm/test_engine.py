"""The vLLM adapter against the contract of all engines, and against a server that misbehaves; the server is played from recordings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from polyphase.engines.served.engine import ServedEngine
from polyphase.engines.served.kv_events import KvEventObserver
from polyphase.engines.vllm.dialects import dialect_of
from polyphase.engines.vllm.metrics import MetricsObserver, cache_of
from polyphase.testing.engines import EngineConformance, stepping
from polyphase.text import Tokenizer
from polyphase.wire.cards import ModelCard
from polyphase.wire.requests import FinishReason, SamplingParams, StopConditions, Submit
from tests.unit.vllm.double import EventsDouble, Recording, VllmDouble, serving

RECORDING = Recording()
UNTIL_CLEARED = 1 + next(place for place, batch in enumerate(RECORDING.batches) if place and b"AllBlocksCleared" in batch[-1])
TOKENIZER = (
    '{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{"a":0,"b":1},"merges":[]},'
    '"decoder":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true}}'
)


def card_of_recording() -> ModelCard:
    block_size, block_count = cache_of(RECORDING.pages["/metrics"])
    return ModelCard(
        name="tiny",
        tokenizer_json=TOKENIZER.encode(),
        chat_template=None,
        bos_token=None,
        eos_token=None,
        bos_token_id=0,
        eos_token_ids=[1],
        vocab_size=4096,
        context_length=4096,
        block_size=block_size,
        block_count=block_count,
        max_batch_tokens=2048,
        max_running=16,
        can_hand_over=False,
        resumes_sampling=False,
        block_bytes=0,
        engine="vllm",
    )


def engine_of(url: str, *, has_generate: bool = True, events: EventsDouble | None = None) -> ServedEngine:
    card = card_of_recording()
    observers: list[MetricsObserver | KvEventObserver] = [MetricsObserver(0.02)]
    if events is not None:
        observers.append(KvEventObserver(events.endpoint, events.replay_endpoint, "kv-events", card.block_size))
    dialect = dialect_of("tiny", has_generate=has_generate, takes_priority=True)
    return ServedEngine(card, Tokenizer.from_json(TOKENIZER.encode()), url, dialect, observers)


@pytest.fixture
async def events(tmp_path: Path) -> AsyncIterator[EventsDouble]:
    async with EventsDouble(tmp_path, RECORDING.batches[: UNTIL_CLEARED - 1]) as double:
        yield double


@pytest.fixture
async def double() -> AsyncIterator[VllmDouble]:
    async with serving(VllmDouble(RECORDING)) as double:
        yield double


@pytest.fixture
def engine(double: VllmDouble, events: EventsDouble) -> ServedEngine:
    return engine_of(double.url, events=events)


class TestOverGenerate(EngineConformance):
    pass


class TestOverCompletions(EngineConformance):
    @pytest.fixture
    async def engine(self, events: EventsDouble) -> AsyncIterator[ServedEngine]:
        async with serving(VllmDouble(RECORDING, has_generate=False)) as double:
            yield engine_of(double.url, has_generate=False, events=events)


def request(request_id: str, prompt: list[int] | None = None, max_tokens: int = 6, **fields: object) -> Submit:
    prompt = prompt or list(range(100, 200))
    given = {"sampling": SamplingParams(seed=1, temperature=0.0), "stop": StopConditions(max_tokens=max_tokens, ignore_eos=True), **fields}
    return Submit(request_id=request_id, token_ids=prompt, prompt_token_count=len(prompt), **given)  # type: ignore[arg-type]


async def test_what_is_sent_is_what_was_recorded(engine: ServedEngine, double: VllmDouble) -> None:
    """Sampling, salts and logprobs as the real one took them."""
    async with stepping(engine) as run:
        engine.submit(request("a", [10, 11, 12, 13, 14], sampling=SamplingParams(seed=7, temperature=0.8, top_k=20)))
        engine.submit(request("b", cache_salt="tenant-a"))
        for request_id in ("a", "b"):
            assert (await run.end(request_id)).finish_reason is FinishReason.LENGTH
    assert not double.unrecorded


async def test_a_refusal_is_the_callers_fault_and_final(engine: ServedEngine) -> None:
    async with stepping(engine) as run:
        engine.submit(request("a", [99999]))
        end = await run.end("a")
    assert end.finish_reason is FinishReason.ERROR
    assert end.failure is not None
    assert (end.failure.code, end.failure.is_retryable) == ("invalid_value", False)
    assert end.failure.message == "vllm refused the request: Token id 99999 is out of vocabulary"


@pytest.mark.parametrize(
    ("manner", "said"),
    [
        ("cut", "the connection to vllm broke"),
        ("mute", "vllm ended its answer after 3 tokens without saying why"),
        ("die", "vllm failed: EngineCore encountered an issue"),
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


async def test_an_abort_closes_the_connection(engine: ServedEngine, double: VllmDouble) -> None:
    async with stepping(engine) as run:
        engine.submit(request("hang-a", max_tokens=40))
        await run.until(lambda: len(run.tokens("hang-a")) == 3, "three tokens")
        engine.abort("hang-a")
        assert (await run.end("hang-a")).finish_reason is FinishReason.CANCELLED
        await asyncio.wait_for(double.closed_by_client.wait(), 30)


async def test_a_server_that_hangs_makes_no_steps(engine: ServedEngine) -> None:
    """Its metrics go on being answered; frontends see the worker stand still."""
    async with stepping(engine) as run:
        engine.submit(request("hang-a", max_tokens=40))
        await run.until(lambda: len(run.tokens("hang-a")) == 3, "three tokens")
        step = engine.load().step
        await asyncio.sleep(0.2)  # ten looks at the metrics
        load = engine.load()
        assert (load.step, load.running_count) == (step, 1)


async def test_the_prompt_leg_ends_with_one_token(engine: ServedEngine, double: VllmDouble) -> None:
    """Nobody can read its blocks, so there is no offer; the body is no recorded one, which the double says."""
    async with stepping(engine) as run:
        engine.submit(request("a", hand_over=True))
        await run.end("a")
    assert '"max_tokens":1' in double.unrecorded[0]


async def test_a_server_that_has_gone_ends_the_engine() -> None:
    async with serving(VllmDouble(RECORDING)) as double:
        engine = engine_of(double.url)
    with pytest.raises(Exception, match="cannot be reached any more"):
        await asyncio.wait_for(engine.run(lambda report: None), 60)


async def test_the_double_knows_only_what_was_recorded(double: VllmDouble) -> None:
    async with httpx.AsyncClient(base_url=double.url) as client:
        answer = await client.post("/inference/v1/generate", json={"model": "tiny", "token_ids": [1], "surprise": True})
    assert answer.status_code == 400
