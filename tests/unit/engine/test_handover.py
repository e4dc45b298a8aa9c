"""Prefill here, decode there: offers, leases, pulls, and every way in which they can fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import msgspec
import pytest

from polyphase.core.clock import ManualClock
from polyphase.core.errors import TransferError
from polyphase.engines.interface import BlockSource
from polyphase.engines.torch.engine import TorchEngine
from polyphase.transfer import HostMemory, SharedPool, Verdict
from polyphase.wire.kv import KvOffer
from polyphase.wire.requests import FinishReason, SamplingParams, StopConditions
from tests.unit.engine.agents import AgentPair
from tests.unit.engine.tiny import Answers, Peer, assert_nothing_held, prompt_of, run_all, submit

MakeEngine = Callable[..., TorchEngine]
PeerOf = Callable[[str], Peer]
COUNT = 10


class Pair:
    """A prefill engine whose pool a decode engine has opened."""

    def __init__(self, prefill: TorchEngine, decode: TorchEngine) -> None:
        self.prefill, self.decode = prefill, decode
        self.agents = AgentPair(prefill, decode)
        self.source: BlockSource = self.agents.source

    def close(self) -> None:
        self.agents.close()

    def offer(self, name: str, prompt: list[int]) -> tuple[int, KvOffer]:
        """The first token and the offer of a prompt computed by the prefill engine."""
        self.prefill.submit(submit(name, prompt, COUNT, hand_over=True))
        answers = run_all(self.prefill)
        end = answers.end(name)
        assert end.finish_reason is FinishReason.HANDED_OVER
        assert end.offer is not None
        (token,) = answers.tokens(name)
        return token, end.offer

    def take(self, name: str, prompt: list[int], token: int, offer: KvOffer) -> Answers:
        self.decode.submit(submit(name, prompt, COUNT, emitted=[token], offer=offer), self.source)
        answers = run_all(self.decode)
        assert [o for report in answers.reports for o in report.released_offers] == [offer]  # exactly once
        return answers


def spoil_blocks(pool: SharedPool, block_ids: list[int]) -> None:
    for block_id in block_ids:
        pool.blocks[block_id * pool.block_bytes : (block_id + 1) * pool.block_bytes] = b"\xff" * pool.block_bytes  # as floats: no numbers


@pytest.fixture
def pair(make_engine: MakeEngine) -> Iterator[Pair]:
    made = Pair(make_engine(), make_engine())
    yield made
    made.close()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100, 512, 2000])
def test_tokens_equal_those_of_one_engine(length: int, pair: Pair, peer_of: PeerOf) -> None:
    prompt = prompt_of(length)
    token, offer = pair.offer("a", prompt)
    assert offer.token_count == length
    assert pair.prefill.load().leased_block_count == len(offer.block_ids) == -(-length // 16)
    answers = pair.take("a", prompt, token, offer)
    assert [token, *answers.tokens("a")] == peer_of("llama").greedy(prompt, COUNT)
    stats = answers.stats("a")
    assert (stats.cached_token_count, stats.transferred_token_count) == (0, length)
    assert stats.transferred_bytes == len(offer.block_ids) * 8192
    pair.prefill.release_lease(offer.lease_id)
    pair.prefill.release_lease(offer.lease_id)
    assert pair.decode.load().transferred_tokens_total == length
    for engine in (pair.prefill, pair.decode):
        assert_nothing_held(engine)


def test_only_what_is_not_cached_is_pulled_and_it_is_cached_then(pair: Pair, peer_of: PeerOf) -> None:
    prompt = prompt_of(100)
    pair.decode.submit(submit("warm", prompt[:40], 1))
    run_all(pair.decode)
    token, offer = pair.offer("a", prompt)
    answers = pair.take("a", prompt, token, offer)
    assert [token, *answers.tokens("a")] == peer_of("llama").greedy(prompt, COUNT)
    stats = answers.stats("a")
    assert (stats.cached_token_count, stats.transferred_token_count) == (32, 68)
    again = pair.take("b", prompt, token, offer)
    stats = again.stats("b")
    assert stats.cached_token_count == 96
    assert stats.transferred_token_count == 4


def test_scattered_blocks_on_both_sides(make_engine: MakeEngine, peer_of: PeerOf) -> None:
    pair = Pair(make_engine(kv_bytes=40 * 8192), make_engine(kv_bytes=40 * 8192))
    for engine in (pair.prefill, pair.decode):
        for seed in range(12):  # interleaved growth scatters what comes afterwards
            engine.submit(submit(f"{seed}", prompt_of(10 + seed, seed), 30))
        run_all(engine)
    prompt = prompt_of(300)
    token, offer = pair.offer("a", prompt)
    assert offer.block_ids != list(range(offer.block_ids[0], offer.block_ids[0] + len(offer.block_ids)))
    answers = pair.take("a", prompt, token, offer)
    assert [token, *answers.tokens("a")] == peer_of("llama").greedy(prompt, COUNT)
    assert answers.stats("a").transferred_token_count == 300
    pair.close()


def test_seeds_survive_the_move(pair: Pair, make_engine: MakeEngine) -> None:
    sampling = SamplingParams(seed=11, temperature=1.5)
    alone = make_engine()
    prompt = prompt_of(50)
    alone.submit(submit("a", prompt, COUNT, sampling=sampling))
    wanted = run_all(alone).tokens("a")
    pair.prefill.submit(submit("a", prompt, COUNT, sampling=sampling, hand_over=True))
    prefilled = run_all(pair.prefill)
    offer = prefilled.end("a").offer
    pair.decode.submit(submit("a", prompt, COUNT, emitted=prefilled.tokens("a"), sampling=sampling, offer=offer), pair.source)
    assert prefilled.tokens("a") + run_all(pair.decode).tokens("a") == wanted


def test_a_first_token_that_ends_the_request_makes_no_offer(pair: Pair) -> None:
    pair.prefill.submit(submit("one", prompt_of(20), 1, hand_over=True))
    eos = pair.prefill.card.eos_token_ids[0]
    sampling = SamplingParams(seed=0, temperature=0, logit_bias={eos: 1000.0})
    pair.prefill.submit(submit("eos", prompt_of(21), sampling=sampling, stop=StopConditions(max_tokens=9), hand_over=True))
    answers = run_all(pair.prefill)
    assert (answers.reason("one"), answers.reason("eos")) == (FinishReason.LENGTH, FinishReason.STOP)
    assert answers.end("one").offer is None
    assert answers.end("eos").offer is None
    assert_nothing_held(pair.prefill)


def test_an_engine_that_nobody_can_read_from_serves_the_whole_request(make_engine: MakeEngine, peer_of: PeerOf) -> None:
    engine = make_engine()  # bind_offers was not called
    engine.submit(submit("a", prompt_of(20), COUNT, hand_over=True))
    assert run_all(engine).tokens("a") == peer_of("llama").greedy(prompt_of(20), COUNT)


class TestRecompute:
    """Whatever is wrong with an offer, the answer is right."""

    def outcome(self, pair: Pair, spoil: Callable[[KvOffer], KvOffer], peer: Peer, most: int = 0) -> None:
        prompt = prompt_of(100)
        token, offer = pair.offer("a", prompt)
        answers = pair.take("a", prompt, token, spoil(offer))
        assert [token, *answers.tokens("a")] == peer.greedy(prompt, COUNT)
        assert answers.stats("a").transferred_token_count <= most
        assert_nothing_held(pair.decode)

    def test_blocks_that_were_given_to_somebody_else(self, make_engine: MakeEngine, peer_of: PeerOf) -> None:
        pair = Pair(make_engine(kv_bytes=16 * 8192), make_engine())

        def reuse(offer: KvOffer) -> KvOffer:
            pair.prefill.release_lease(offer.lease_id)
            pair.prefill.submit(submit("other", prompt_of(200, 5), 40))
            run_all(pair.prefill)
            return offer

        self.outcome(pair, reuse, peer_of("llama"), most=16)  # the pool hands its blocks out in such an order that one is still good
        pair.close()

    def test_another_model(self, pair: Pair, peer_of: PeerOf) -> None:
        def spoil(offer: KvOffer) -> KvOffer:
            assert offer.region is not None
            assert offer.layout is not None
            layout = msgspec.structs.replace(offer.layout, fingerprint="another")
            region = msgspec.structs.replace(offer.region, layout=layout)
            return msgspec.structs.replace(offer, agent=msgspec.structs.replace(offer.agent, regions=[region]))

        self.outcome(pair, spoil, peer_of("llama"))

    @pytest.mark.parametrize("change", [{"block_ids": [1]}, {"generations": []}, {"token_count": 0}, {"expires_at_ns": 1}])
    def test_an_offer_that_cannot_be(self, change: dict[str, object], pair: Pair, peer_of: PeerOf) -> None:
        self.outcome(pair, lambda offer: msgspec.structs.replace(offer, **change), peer_of("llama"))

    def test_blocks_beyond_the_pool(self, pair: Pair, peer_of: PeerOf) -> None:
        def spoil(offer: KvOffer) -> KvOffer:
            return msgspec.structs.replace(offer, block_ids=[10**6 + i for i in range(len(offer.block_ids))])

        self.outcome(pair, spoil, peer_of("llama"))

    def test_a_failure_in_the_middle(self, pair: Pair, peer_of: PeerOf) -> None:
        class Flaky:
            def read_blocks(self, block_ids: object, generations: object, into: SharedPool, places: list[int]) -> bytes:
                spoil_blocks(into, places)
                raise TransferError("the link went down")

        pair.source = Flaky()  # type: ignore[assignment]
        self.outcome(pair, lambda offer: offer, peer_of("llama"))

    @pytest.mark.parametrize("good_count", [0, 1, 5, 6])
    def test_some_blocks_arrive_and_the_rest_is_computed(self, good_count: int, pair: Pair, peer_of: PeerOf) -> None:
        source = pair.source

        class Lossy:
            def read_blocks(self, block_ids: list[int], generations: list[int], into: SharedPool, places: list[int]) -> bytes:
                verdicts = bytearray(source.read_blocks(block_ids, generations, into, places))
                verdicts[good_count] = Verdict.CORRUPT
                spoil_blocks(into, places[good_count : good_count + 1])
                return bytes(verdicts)

        pair.source = Lossy()  # type: ignore[assignment]
        prompt = prompt_of(100)
        token, offer = pair.offer("a", prompt)
        answers = pair.take("a", prompt, token, offer)
        assert [token, *answers.tokens("a")] == peer_of("llama").greedy(prompt, COUNT)
        assert answers.stats("a").transferred_token_count == 16 * good_count
        assert_nothing_held(pair.decode)


class TestReleasedOffers:
    """An offer that the engine took is released once, however the request ends."""

    def test_cancelled_while_it_waits(self, pair: Pair) -> None:
        token, offer = pair.offer("a", prompt_of(50))
        pair.decode.submit(submit("a", prompt_of(50), COUNT, emitted=[token], offer=offer), pair.source)
        pair.decode.abort("a")
        answers = run_all(pair.decode)
        assert [report.released_offers for report in answers.reports] == [[offer]]

    def test_all_is_cached_here(self, pair: Pair) -> None:
        prompt = prompt_of(48)
        pair.decode.submit(submit("warm", prompt, 2))
        run_all(pair.decode)
        token, offer = pair.offer("a", prompt)
        assert pair.take("a", prompt, token, offer).stats("a").transferred_bytes == 0

    def test_a_step_that_raises(self, pair: Pair) -> None:
        token, offer = pair.offer("a", prompt_of(50))

        def forward(*_: object) -> None:
            raise RuntimeError("no")

        pair.decode._runner.forward = forward  # type: ignore[method-assign,assignment]
        assert pair.take("a", prompt_of(50), token, offer).reason("a") is FinishReason.ERROR
        assert_nothing_held(pair.decode)

    def test_what_was_not_opened_or_was_refused_is_the_caller_s(self, pair: Pair) -> None:
        token, offer = pair.offer("a", prompt_of(50))
        pair.decode.submit(submit("a", prompt_of(50), COUNT, emitted=[token], offer=offer), None)
        with pytest.raises(Exception, match="running already"):
            pair.decode.submit(submit("a", prompt_of(50), COUNT, offer=offer), pair.source)
        assert all(not report.released_offers for report in run_all(pair.decode).reports)


class TestLeases:
    def test_they_run_out(self, make_engine: MakeEngine) -> None:
        engine = make_engine(lease_s=5)
        clock = ManualClock()
        engine._clock = engine.core._clock = clock
        pair = Pair(engine, engine)
        _, offer = pair.offer("a", prompt_of(50))
        assert offer.expires_at_ns == 5_000_000_000
        clock.advance(4_999_999_999)
        engine.step()
        assert engine.load().leased_block_count == 4
        clock.advance(1)
        engine.step()
        assert_nothing_held(engine)
        pair.close()

    async def test_they_run_out_while_the_engine_sleeps(self, make_engine: MakeEngine) -> None:
        engine = make_engine(lease_s=0.05)
        pair = Pair(engine, engine)
        pair.offer("a", prompt_of(50))
        running = asyncio.create_task(engine.run(lambda report: None))
        async with asyncio.timeout(30):
            while engine.load().leased_block_count:  # noqa: ASYNC110  the end of a lease is reported by nothing else
                await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert_nothing_held(engine)
        pair.close()

    def test_cancelling_the_request_ends_its_lease(self, pair: Pair) -> None:
        pair.offer("a", prompt_of(50))
        pair.prefill.abort("a")
        assert_nothing_held(pair.prefill)

    def test_who_needs_leased_blocks_waits_for_them(self, make_engine: MakeEngine) -> None:
        engine = make_engine(kv_bytes=8 * 8192)
        pair = Pair(engine, engine)
        _, offer = pair.offer("a", prompt_of(100))
        engine.submit(submit("b", prompt_of(60, 1), 2))
        assert engine.step() is None
        assert engine.load().waiting_count == 1
        engine.release_lease(offer.lease_id)
        assert len(run_all(engine).tokens("b")) == 2
        assert_nothing_held(engine)
        pair.close()

    def test_a_released_offer_stays_readable_until_its_blocks_change(self, pair: Pair) -> None:
        _, offer = pair.offer("a", prompt_of(50))
        pair.prefill.release_lease(offer.lease_id)
        target = HostMemory(bytearray(4 * 8192), 8192)
        assert set(pair.source.read_blocks(offer.block_ids, offer.generations, target, range(4))) == {Verdict.DONE}
