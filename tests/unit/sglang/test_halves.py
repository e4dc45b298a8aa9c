"""Prefill and decode on two SGLang servers, as recorded: the offer comes before the prompt is computed, and both legs run at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from polyphase.engines.served.engine import ServedEngine
from polyphase.engines.sglang.bootstrap import BootstrapPrefill
from polyphase.engines.sglang.dialect import GenerateDialect
from polyphase.testing.engines import stepping
from polyphase.text import Tokenizer
from polyphase.wire.kv import EngineOffer
from polyphase.wire.requests import FinishReason
from polyphase.worker.warm_up import warm_up
from tests.unit.sglang.double import HALVES, Recording, Rooms, SglangDouble, serving
from tests.unit.sglang.test_engine import card_of, facts_in, manners_of, request
from tests.unit.vllm.test_engine import TOKENIZER

KIND = "sglang/1"


class Halves:
    def __init__(self, prefill: SglangDouble, decode: SglangDouble) -> None:
        self.doubles = {"prefill": prefill, "decode": decode}
        self.prefill, self.decode = (self._engine(double) for double in (prefill, decode))

    def _engine(self, double: SglangDouble) -> ServedEngine:
        facts = facts_in(double.recording)
        assert facts.bootstrap_port is not None
        dialect = GenerateDialect(manners_of(facts))
        prefill = BootstrapPrefill(dialect, "127.0.0.1", facts.bootstrap_port, facts.context_length)
        card = card_of(facts, can_hand_over=facts.mode == "prefill", serves_whole=False, offer_kind=KIND)
        engine = ServedEngine(card, Tokenizer.from_json(TOKENIZER.encode()), double.url, dialect, prefill=prefill)
        engine.bind_offers(worker_id=f"{facts.mode}-0", epoch=3, endpoint=f"ipc://{facts.mode}")
        return engine


@pytest.fixture
async def halves() -> AsyncIterator[Halves]:
    rooms = Rooms()
    async with AsyncExitStack() as stack:
        doubles = [
            await stack.enter_async_context(serving(SglangDouble(Recording(HALVES, half), rooms=rooms))) for half in ("prefill", "decode")
        ]
        yield Halves(*doubles)


async def until(condition: Callable[[], bool]) -> None:
    """Of what has no event to wait for."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def offer_of(engine: ServedEngine, run: Any, request_id: str = "a") -> EngineOffer:
    engine.submit(request(request_id, hand_over=True))
    end = await run.end(request_id)
    assert (end.finish_reason, end.token_ids) == (FinishReason.HANDED_OVER, [])
    assert isinstance(end.offer, EngineOffer)
    return end.offer


async def test_both_legs_run_at_the_same_time_and_the_decode_leg_tells_all_tokens(halves: Halves) -> None:
    async with stepping(halves.prefill) as prefill, stepping(halves.decode) as decode:
        offer = await offer_of(halves.prefill, prefill)
        assert not any(output.token_ids for output in prefill.outputs("a"))
        assert halves.prefill.load().waiting_prefill_tokens == 100, "it is offered, and not computed yet"
        halves.decode.submit(request("a", offer=offer))
        assert (await decode.end("a")).finish_reason is FinishReason.LENGTH
        await until(lambda: not halves.prefill.load().waiting_prefill_tokens)
    assert decode.tokens("a") == [1353, 289, 1429, 279, 2831, 1827]
    assert [report.released_offers for report in decode.reports if report.released_offers] == [[offer]]
    asked = [halves.doubles[half].bodies[0] for half in ("prefill", "decode")]
    assert asked[0] == {**asked[1], "stream": False}, "the same body goes to both"
    assert asked[0]["bootstrap_port"] == 7399
    assert halves.prefill.load().cached_prompt_tokens_total == 96, "as the prefill server said in the end"


async def test_rooms_are_never_the_same(halves: Halves) -> None:
    async with stepping(halves.prefill) as prefill:
        offers = [await offer_of(halves.prefill, prefill, name) for name in "abc"]
    assert len({offer.params["bootstrap_room"] for offer in offers}) == 3
    assert all(0 <= offer.params["bootstrap_room"] < 1 << 63 for offer in offers)


async def test_a_leg_that_nobody_wants_any_more_is_ended_by_name(halves: Halves) -> None:
    async with stepping(halves.prefill) as prefill:
        released = await offer_of(halves.prefill, prefill, "a")
        await offer_of(halves.prefill, prefill, "b")
        double = halves.doubles["prefill"]
        await until(lambda: len(double.bodies) == 2)
        halves.prefill.release_lease(released.lease_id)
        halves.prefill.abort("b")
        await until(lambda: len(double.aborted) == 2)
    assert sorted(double.aborted) == ["a", "b"]


async def test_a_prefill_server_that_died_is_no_fault_of_the_decode_server(halves: Halves) -> None:
    offer = EngineOffer("prefill-0", 3, "ipc://p", "lost-a#1", 1 << 62, KIND, {"bootstrap_room": 12345}, 100)
    async with stepping(halves.decode) as decode:
        halves.decode.submit(request("lost-a", offer=offer))
        end = await decode.end("lost-a")
    assert end.failure is not None
    assert (end.failure.code, end.failure.is_retryable) == ("peer_lost", True)
    assert "Lost connection with prefill instance" in end.failure.message


@pytest.mark.parametrize("half", ["prefill", "decode"])
async def test_no_half_serves_a_whole_request(halves: Halves, half: str) -> None:
    engine = getattr(halves, half)
    strange = EngineOffer("prefill-0", 3, "ipc://p", "a#1", 1 << 62, "vllm-nixl/1", {"x": 1}, 100)
    async with stepping(engine) as run:
        engine.submit(request("a"))
        engine.submit(request("b", offer=strange))
        ends = [await run.end(name) for name in "ab"]
    assert all(end.failure is not None and end.failure.is_retryable and f"does the {half} half only" in end.failure.message for end in ends)
    assert not halves.doubles[half].bodies


@pytest.mark.parametrize("half", ["prefill", "decode"])
async def test_a_worker_does_not_ask_half_an_engine_for_its_first_token(halves: Halves, half: str) -> None:
    assert await warm_up(getattr(halves, half)) == []
    assert not halves.doubles[half].bodies
