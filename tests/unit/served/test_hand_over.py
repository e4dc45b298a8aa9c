"""Engines that move KV themselves: a prefill leg ends with an offer, a decode leg begins with one, and what nobody wants is ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from polyphase.core.clock import ManualClock
from polyphase.core.errors import WireError
from polyphase.engines.served.dialect import Chunk, Usage
from polyphase.engines.served.engine import ServedEngine
from polyphase.engines.served.offers import OpenOffers
from polyphase.testing.engines import EngineRun, stepping
from polyphase.text import Tokenizer
from polyphase.wire.kv import EngineOffer
from polyphase.wire.requests import FinishReason, SamplingParams, StopConditions, Submit
from tests.unit.vllm.test_engine import TOKENIZER, card_of_recording

KIND = "toy/1"
PROMPT = list(range(100, 200))


class Toy:
    """A server of a protocol as simple as can be: a body is echoed back, or held until it is told to go on."""

    def __init__(self) -> None:
        self.port = 0
        self.bodies: list[dict[str, Any]] = []
        self.was_asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.closed_by_client = asyncio.Event()
        self.answer: dict[str, Any] = {"params": {"room": 5}, "tokens": []}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length: ")[2].split("\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                self.bodies.append(body)
                self.was_asked.set()
                gone = asyncio.create_task(reader.read(1))
                go_on = asyncio.create_task(self.may_answer.wait())
                await asyncio.wait({gone, go_on}, return_when=asyncio.FIRST_COMPLETED)
                if not go_on.done():
                    self.closed_by_client.set()
                    go_on.cancel()
                    break
                gone.cancel()
                await asyncio.wait({gone})
                text = json.dumps(self.answer)
                if "prefill" not in body:
                    text = "".join(f"data: {json.dumps({'tokens': [token]})}\n\n" for token in (7, 8)) + 'data: {"end": "length"}\n\n'
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(text), text.encode()))
        writer.close()


class ToyDialect:
    path = "/generate"
    lease_s = 30.0

    def __init__(self, early: dict[str, Any] | None = None) -> None:
        self._early = early

    def body(self, request: Submit, max_tokens: int) -> bytes:
        offered = request.offer.params if isinstance(request.offer, EngineOffer) else None
        return json.dumps({"tokens": request.token_ids, "max": max_tokens, "offered": offered}).encode()

    def read(self, data: bytes) -> Chunk:
        said = json.loads(data)
        return Chunk(said.get("tokens", ()), finish=said.get("end"), usage=Usage(len(PROMPT), 96) if "end" in said else None)

    def early_params(self, request: Submit) -> dict[str, Any] | None:
        return self._early

    def prefill_body(self, request: Submit, early_params: dict[str, Any] | None) -> bytes:
        return json.dumps({"prefill": request.token_ids, "early": early_params}).encode()

    def read_prefill(self, body: bytes) -> Chunk:
        said = json.loads(body)
        if "broken" in said:
            raise WireError("broken")
        return Chunk(said["tokens"], finish="length", usage=Usage(len(PROMPT), 32), offer_params=said["params"])


@pytest.fixture
async def toy() -> AsyncIterator[Toy]:
    toy = Toy()
    server = await asyncio.start_server(toy.serve, "127.0.0.1", 0)
    toy.port = server.sockets[0].getsockname()[1]
    yield toy
    server.close()


def engine_of(toy: Toy, early: dict[str, Any] | None = None) -> ServedEngine:
    card = msgspec.structs.replace(card_of_recording(), can_hand_over=True, offer_kind=KIND, eos_token_ids=[1])
    dialect = ToyDialect(early)
    engine = ServedEngine(card, Tokenizer.from_json(TOKENIZER.encode()), f"http://127.0.0.1:{toy.port}", dialect, prefill=dialect)
    engine.bind_offers(worker_id="p", epoch=3, endpoint="ipc://p")
    return engine


def request(request_id: str = "a", **fields: Any) -> Submit:
    given = {"sampling": SamplingParams(seed=1, temperature=0.0), "stop": StopConditions(max_tokens=2, ignore_eos=True), **fields}
    return Submit(request_id=request_id, token_ids=PROMPT, prompt_token_count=len(PROMPT), **given)


async def prefill(engine: ServedEngine, run: EngineRun) -> EngineOffer:
    engine.submit(request(hand_over=True))
    end = await run.end("a")
    assert (end.finish_reason, end.failure) == (FinishReason.HANDED_OVER, None)
    assert isinstance(end.offer, EngineOffer)
    return end.offer


async def test_an_offer_goes_from_one_to_another(toy: Toy) -> None:
    engine = engine_of(toy)
    async with stepping(engine) as run:
        offer = await prefill(engine, run)
        assert run.tokens("a") == [], "the decode leg makes the first token"
        assert (offer.worker_id, offer.epoch, offer.endpoint, offer.kind) == ("p", 3, "ipc://p", KIND)
        assert (offer.params, offer.token_count) == ({"room": 5}, 100)
        load = engine.load()
        assert (load.leased_block_count, load.prompt_tokens_total, load.cached_prompt_tokens_total) == (4, 100, 32)
        engine.submit(request("b", offer=offer))
        await run.end("b")
        assert toy.bodies[-1]["offered"] == {"room": 5}
        assert run.tokens("b") == [7, 8]
        told = [output.stats for output in run.outputs("b") if output.stats is not None]
        assert [stats.transferred_token_count for stats in told] == [100]
        load = engine.load()
        assert (load.transferred_tokens_total, load.cached_prompt_tokens_total) == (100, 32), "not what the other leg found cached"
        assert [one for report in run.reports for one in report.released_offers] == [offer], "once"
        engine.release_lease(offer.lease_id)
        engine.release_lease("unknown")
        assert engine.load().leased_block_count == 0


async def test_an_early_offer_comes_while_the_prompt_is_computed(toy: Toy) -> None:
    engine = engine_of(toy, {"host": "127.0.0.1", "port": 9, "room": 77})
    toy.may_answer.clear()
    async with stepping(engine) as run:
        offer = await prefill(engine, run)
        assert offer.params["room"] == 77
        await asyncio.wait_for(toy.was_asked.wait(), 30)
        engine.release_lease(offer.lease_id)
        await asyncio.wait_for(toy.closed_by_client.wait(), 30)
    assert toy.bodies[0]["early"]["room"] == 77


async def test_an_abort_ends_what_was_handed_over_early(toy: Toy) -> None:
    engine = engine_of(toy, {"room": 1})
    toy.may_answer.clear()
    async with stepping(engine) as run:
        await prefill(engine, run)
        await asyncio.wait_for(toy.was_asked.wait(), 30)
        engine.abort("a")
        await asyncio.wait_for(toy.closed_by_client.wait(), 30)
        assert engine.load().leased_block_count == 0


async def test_tokens_may_come_with_the_offer(toy: Toy) -> None:
    toy.answer = {"params": {"first_gen_tokens": [42]}, "tokens": [42]}
    engine = engine_of(toy)
    async with stepping(engine) as run:
        offer = await prefill(engine, run)
        assert (run.tokens("a"), offer.params) == ([42], {"first_gen_tokens": [42]})


async def test_without_params_it_is_handed_over_with_its_token(toy: Toy) -> None:
    toy.answer = {"params": None, "tokens": [42]}
    engine = engine_of(toy)
    async with stepping(engine) as run:
        engine.submit(request(hand_over=True))
        end = await run.end("a")
    assert (end.finish_reason, end.offer, run.tokens("a")) == (FinishReason.HANDED_OVER, None, [42])


async def test_a_first_token_that_ends_it_needs_nobody_else(toy: Toy) -> None:
    toy.answer = {"params": {"room": 5}, "tokens": [1]}
    engine = engine_of(toy)
    async with stepping(engine) as run:
        engine.submit(request(hand_over=True, stop=StopConditions(max_tokens=2)))
        end = await run.end("a")
    assert (end.finish_reason, end.offer) == (FinishReason.STOP, None)


async def test_a_broken_answer_ends_the_leg(toy: Toy) -> None:
    toy.answer = {"broken": True}
    engine = engine_of(toy)
    async with stepping(engine) as run:
        engine.submit(request(hand_over=True))
        end = await run.end("a")
    assert end.finish_reason is FinishReason.ERROR
    assert engine.load().leased_block_count == 0


async def test_an_offer_of_another_kind_is_given_back_at_once(toy: Toy) -> None:
    engine = engine_of(toy)
    foreign = EngineOffer("q", 1, "ipc://q", "x#1", 2**62, "toy/2", {"room": 9}, 100)
    async with stepping(engine) as run:
        engine.submit(request("b", offer=foreign))
        await run.end("b")
    assert toy.bodies[-1]["offered"] is None
    assert [one for report in run.reports for one in report.released_offers] == [foreign]


def test_what_nobody_fetched_is_given_up_with_the_servers_own_lease() -> None:
    clock = ManualClock(0)
    offers = OpenOffers(KIND, 30.0, 32, clock)
    offers.bind("p", 1, "ipc://p")
    first = offers.make(request("a"), {}, None)
    clock.advance(20 * 10**9)
    offers.make(request("b"), {}, None)
    assert first.expires_at_ns == 30 * 10**9
    assert offers.block_count() == 8
    clock.advance(11 * 10**9)
    assert offers.block_count() == 4
    offers.release_request("b")
    assert offers.block_count() == 0
