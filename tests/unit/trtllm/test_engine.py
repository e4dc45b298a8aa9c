"""The TensorRT-LLM adapter before a double of its protocol, which is strict; the real engine needs NVIDIA hardware."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from polyphase.core.errors import ModelLoadError
from polyphase.core.hashing import sequence_hashes
from polyphase.engines.served.engine import ServedEngine
from polyphase.engines.served.settings import ServerSettings
from polyphase.engines.trtllm.assembly import load_trtllm_engine
from polyphase.testing.engines import EngineConformance, EngineRun, stepping
from polyphase.wire.cards import Role
from polyphase.wire.events import Tier
from polyphase.wire.kv import EngineOffer
from polyphase.wire.requests import FinishReason, Grammar, GrammarKind, SamplingParams, StopConditions, Submit
from tests.unit.trtllm.double import CUT, DIE, HANG, MUTE, TrtllmDouble, next_token, serving, write_model

PROMPT = list(range(100, 200))
Attach = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


@pytest.fixture
async def double() -> AsyncIterator[TrtllmDouble]:
    async with serving(TrtllmDouble()) as double:
        yield double


@pytest.fixture
def attach(model: Path, tmp_path: Path) -> Attach:
    """The double answers on this loop, so whoever waits for it without one does so in a thread."""

    async def attached(double: TrtllmDouble, role: Role = Role.BOTH) -> ServedEngine:
        settings = ServerSettings(str(model), "tiny", tmp_path, attach=double.url, role=role)
        return await asyncio.to_thread(load_trtllm_engine, settings)

    return attached


@pytest.fixture
async def engine(double: TrtllmDouble, attach: Attach) -> ServedEngine:
    return await attach(double)  # type: ignore[no-any-return]


class TestContract(EngineConformance):
    @pytest.fixture
    async def engine(self, double: TrtllmDouble, attach: Attach) -> ServedEngine:
        """With a card that promises no structured output: the double's words follow no grammar."""
        engine: ServedEngine = await attach(double)
        engine._card = msgspec.structs.replace(engine.card, takes_grammars=False)
        return engine


def request(request_id: str, prompt: list[int] = PROMPT, max_tokens: int = 6, **fields: Any) -> Submit:
    stop = fields.pop("stop", StopConditions(max_tokens=max_tokens, ignore_eos=True))
    sampling = fields.pop("sampling", SamplingParams(seed=1, temperature=0.0))
    count = fields.pop("prompt_token_count", len(prompt))
    return Submit(request_id=request_id, token_ids=prompt, prompt_token_count=count, sampling=sampling, stop=stop, **fields)


async def test_the_card_is_what_the_server_says(engine: ServedEngine, double: TrtllmDouble) -> None:
    card = engine.card
    assert (card.engine, card.name, card.block_size, card.block_count, card.context_length) == ("trtllm", "tiny", 32, 512, 4096)
    assert card.publishes_events
    assert (card.can_hand_over, card.keeps_priorities, card.takes_grammars) == (False, False, True)
    assert double.refused == []


async def test_nothing_is_sent_that_asks_for_nothing(engine: ServedEngine, double: TrtllmDouble) -> None:
    async with stepping(engine) as run:
        engine.submit(request("a"))
        await run.end("a")
    assert double.bodies[-1] == {
        "model": "tiny",
        "prompt": PROMPT,
        "detokenize": False,
        "add_special_tokens": False,
        "max_tokens": 6,
        "temperature": 0.0,
        "top_p": 1.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_everything_at_once_is_understood(engine: ServedEngine, double: TrtllmDouble) -> None:
    sampling = SamplingParams(
        seed=2**64 - 1,
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.1,
        logit_bias={7: -100.0},
        top_logprobs=0,
    )
    async with stepping(engine) as run:
        engine.submit(request("a", sampling=sampling, grammar=Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object"}')))
        await run.end("a")
    body = double.bodies[-1]
    assert body["response_format"] == {"type": "json", "schema": {"type": "object"}}
    assert body["logit_bias"] == {"7": -100.0}
    assert 0 <= body["seed"] < 2**63
    assert double.refused == []


async def test_a_moved_sampled_request_does_not_repeat_its_random_numbers(engine: ServedEngine, double: TrtllmDouble) -> None:
    sampling = SamplingParams(seed=5, temperature=1.0)
    async with stepping(engine) as run:
        engine.submit(request("a", sampling=sampling))
        engine.submit(request("b", [*PROMPT, 7, 8], prompt_token_count=len(PROMPT), sampling=sampling))
        await run.end("a")
        await run.end("b")
    first, second = (body["seed"] for body in double.bodies[-2:])
    assert first != second
    assert len(run.tokens("b")) == 4, "six in all"


async def test_what_it_has_no_words_for_is_refused(engine: ServedEngine) -> None:
    async with stepping(engine) as run:
        engine.submit(request("a", cache_salt="mine"))
        end = await run.end("a")
    assert end.failure is not None
    assert "cache salts" in end.failure.message
    assert not end.failure.is_retryable


async def test_cached_tokens_are_told(engine: ServedEngine) -> None:
    async with stepping(engine) as run:
        for name in "ab":
            engine.submit(request(name))
            await run.end(name)
    counts = [output.stats.cached_token_count for name in "ab" for output in run.outputs(name) if output.stats is not None]
    assert counts == [0, 96]


# KV events


async def test_blocks_are_named_as_routers_name_them(engine: ServedEngine, double: TrtllmDouble) -> None:
    names = sequence_hashes(PROMPT, 32)
    async with stepping(engine) as run:
        engine.submit(request("a"))
        await run.end("a")
        await run.until(lambda: set(names) <= run.held, "the prompt's blocks")
        double.evict(PROMPT)
        await run.until(lambda: names[-1] not in run.held, "the removal of the last one")
        assert names[0] in run.held


async def test_a_block_that_is_demoted_is_in_the_other_tier(engine: ServedEngine, double: TrtllmDouble) -> None:
    name = sequence_hashes(PROMPT, 32)[-1]

    def moves(run: EngineRun) -> list[tuple[str, Tier]]:
        events = [event for report in run.reports for event in report.events]
        return [
            (type(event).__name__, event.tier)
            for event in events
            if name in getattr(event, "sequence_hashes", ()) and hasattr(event, "tier")
        ]

    async with stepping(engine) as run:
        engine.submit(request("a"))
        await run.end("a")
        await run.until(lambda: len(moves(run)) == 1, "the block")
        double.demote(PROMPT)
        await run.until(lambda: len(moves(run)) == 3, "its move")
    assert moves(run)[1:] == [("BlocksStored", Tier.HOST), ("BlocksRemoved", Tier.DEVICE)]


async def test_events_that_somebody_else_took_are_noticed(engine: ServedEngine, double: TrtllmDouble) -> None:
    other = list(range(1000, 1064))
    async with stepping(engine) as run:
        engine.submit(request("a"))
        await run.end("a")
        await run.until(lambda: set(sequence_hashes(PROMPT, 32)) <= run.held, "the first prompt's blocks")
        double._tell({"type": "removed", "block_hashes": [1]})
        double.lose_events()
        engine.submit(request("b", other))
        await run.end("b")
        await run.until(lambda: set(sequence_hashes(other, 32)) <= run.held, "the second prompt's blocks")
    assert not set(sequence_hashes(PROMPT, 32)) & run.held, "what was held is not known any more"


# Failures


@pytest.mark.parametrize(
    ("mark", "message"), [(CUT, "the connection to trtllm broke"), (MUTE, "without saying why"), (DIE, "the executor has ended")]
)
async def test_an_answer_that_breaks_off_is_a_failure_that_can_be_retried(engine: ServedEngine, mark: int, message: str) -> None:
    async with stepping(engine) as run:
        engine.submit(request("a", [mark, *PROMPT]))
        end = await run.end("a")
    assert end.finish_reason is FinishReason.ERROR
    assert end.failure is not None
    assert message in end.failure.message
    assert end.failure.is_retryable
    assert len(run.tokens("a")) in (2, 3)


async def test_an_abort_closes_the_connection(engine: ServedEngine, double: TrtllmDouble) -> None:
    async with stepping(engine) as run:
        engine.submit(request("a", [HANG, *PROMPT]))
        await run.until(lambda: len(run.tokens("a")) == 3, "three tokens")
        engine.abort("a")
        await asyncio.wait_for(double.closed_by_client.wait(), 10)
    assert run.outputs("a")[-1].finish_reason is FinishReason.CANCELLED


async def test_a_server_of_another_kind_is_named(double: TrtllmDouble, attach: Attach) -> None:
    double._complete = _no_ids  # type: ignore[method-assign, assignment]
    with pytest.raises(ModelLoadError, match="does not tell token ids"):
        await attach(double)


async def _no_ids(reader: object, writer: asyncio.StreamWriter, asked: object) -> None:
    text = json.dumps({"choices": [{"index": 0, "text": "x", "finish_reason": "length"}]})
    writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(text)}\r\n\r\n{text}".encode())


# Disaggregation


async def test_disaggregated_tokens_are_those_of_one_server(attach: Attach, double: TrtllmDouble) -> None:
    async with serving(TrtllmDouble()) as other:
        prefill, decode, whole = await attach(other, Role.PREFILL), await attach(double, Role.DECODE), await attach(double)
        prefill.bind_offers(worker_id="worker-0", epoch=1, endpoint="ipc://somewhere")
        assert prefill.card.offer_kind == decode.card.offer_kind
        assert prefill.card.can_hand_over
        async with stepping(prefill) as first, stepping(decode) as second, stepping(whole) as alone:
            for number in range(12):
                prompt, name = PROMPT[: 1 + 8 * number], f"r{number}"
                prefill.submit(request(name, prompt, hand_over=True))
                end = await first.end(name)
                assert end.finish_reason is FinishReason.HANDED_OVER
                assert isinstance(end.offer, EngineOffer)
                assert first.tokens(name) == [], "the other one tells it"
                decode.submit(request(name, prompt, offer=end.offer))
                await second.end(name)
                whole.submit(request(name, prompt))
                await alone.end(name)
                assert second.tokens(name) == alone.tokens(name)
        assert other.kept.keys()
        assert double.refused == other.refused == []
        params = [body["disaggregated_params"] for body in double.bodies if "disaggregated_params" in body]
        assert {body["request_type"] for body in params} == {"generation_only"}
        assert all(body["disagg_request_id"] >= 1 << 42 and "draft_tokens" not in body for body in params)


async def test_a_prompt_whose_first_token_ends_it_is_not_handed_over(attach: Attach, double: TrtllmDouble) -> None:
    prefill = await attach(double, Role.PREFILL)
    prefill.bind_offers(worker_id="worker-0", epoch=1, endpoint="ipc://somewhere")
    first = next_token(PROMPT)
    async with stepping(prefill) as run:
        stop = StopConditions(max_tokens=6, ignore_eos=True, stop_token_ids=[first])
        prefill.submit(request("a", hand_over=True, stop=stop))
        end = await run.end("a")
    assert (end.finish_reason, end.stop_reason, run.tokens("a")) == (FinishReason.STOP, first, [first])
    assert end.offer is None


async def test_a_context_that_is_gone_is_an_error_that_can_be_retried(attach: Attach, double: TrtllmDouble) -> None:
    decode = await attach(double, Role.DECODE)
    offer = EngineOffer(
        worker_id="worker-0",
        epoch=1,
        endpoint="ipc://somewhere",
        lease_id="l",
        expires_at_ns=2**62,
        kind=decode.card.offer_kind,
        params={"ctx_request_id": 1, "disagg_request_id": 2, "encoded_opaque_state": "gone", "request_type": "context_only"},
        token_count=len(PROMPT),
    )
    async with stepping(decode) as run:
        decode.submit(request("a", offer=offer))
        end = await run.end("a")
    assert end.failure is not None
    assert end.failure.is_retryable
    assert "no such context" in end.failure.message
