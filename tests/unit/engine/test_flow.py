"""A prompt's KV goes to the decode worker while the rest of it is computed, and whatever becomes of that, the tokens are right."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import cast

import msgspec
import pytest

from polyphase.core.errors import TransferError
from polyphase.engines.interface import BlockSource
from polyphase.engines.torch.engine import TorchEngine
from polyphase.transfer import BlockMemory, Verdict
from polyphase.wire.kv import KvOffer, KvPart
from polyphase.wire.requests import FinishReason, PullAhead, Submit
from polyphase.worker.pulls_ahead import PullsAhead
from polyphase.worker.sources import OfferSources
from tests.unit.engine.agents import AgentPair
from tests.unit.engine.test_handover import spoil_blocks
from tests.unit.engine.tiny import Answers, Peer, assert_nothing_held, prompt_of, run_all, submit

MakeEngine = Callable[..., TorchEngine]
PeerOf = Callable[[str], Peer]
COUNT = 8
CHUNK = 64  # tokens in a step: four blocks


class Source:
    """Reads as the real one does, unless it was told to do badly. Also stands for `OfferSources`: whoever is met, it is this one."""

    def __init__(self, real: BlockSource) -> None:
        self.real = real
        self.block_count = 0  # read so far
        self.bad: dict[int, Verdict] = {}  # by place in what was read so far
        self.is_dead = False

    async def meet(self, agent: object, region_id: str) -> BlockSource:
        return self

    def read_blocks(self, block_ids: Sequence[int], generations: Sequence[int], into: BlockMemory, places: Sequence[int]) -> bytes:
        if self.is_dead:
            spoil_blocks(into, list(places))  # type: ignore[arg-type]
            raise TransferError("the link went down")
        verdicts = bytearray(self.real.read_blocks(block_ids, generations, into, places))
        for place, target in enumerate(places):
            verdict = self.bad.pop(self.block_count + place, None)
            if verdict is not None:
                verdicts[place] = verdict
                spoil_blocks(into, [target])  # type: ignore[arg-type]
        self.block_count += len(block_ids)
        return bytes(verdicts)


class Flow:
    """A prefill and a decode engine, and what a worker and a frontend do between them."""

    def __init__(self, prefill: TorchEngine, decode: TorchEngine) -> None:
        self.prefill, self.decode = prefill, decode
        self.agents = AgentPair(prefill, decode)
        self.source = Source(self.agents.source)
        self.ahead = PullsAhead(decode, decode, cast("OfferSources", self.source))
        self.parts: list[KvPart] = []

    def begin(self, name: str, prompt: list[int], **fields: object) -> None:
        self.prefill.submit(submit(name, prompt, COUNT, hand_over=True, with_parts=True, **fields))

    async def step(self, name: str, prompt: list[int], salt: str | None = None) -> Answers:
        """One chunk of the prompt, and the pulls of what it told of."""
        answers = Answers()
        report = self.prefill.step()
        if report is not None:
            answers.add(report)
            for part in [output.part for output in report.outputs if output.part is not None]:
                self.parts.append(part)
                end = part.first_block + len(part.block_ids)
                self.ahead.add(PullAhead(name, prompt[16 * part.first_block : 16 * end], part, salt))
            await self.settle(name)
        return answers

    async def settle(self, name: str) -> None:
        stream = self.ahead._streams.get(name)
        if stream is not None and stream.task is not None:
            await asyncio.wait([stream.task])

    async def prefill_all(self, name: str, prompt: list[int]) -> tuple[int, KvOffer]:
        while True:
            for output in (await self.step(name, prompt)).outputs.get(name, []):
                if output.finish_reason is not None:
                    assert output.finish_reason is FinishReason.HANDED_OVER
                    assert output.offer is not None
                    return output.token_ids[0], output.offer

    async def take(self, name: str, prompt: list[int], token: int, offer: KvOffer) -> Answers:
        request: Submit = submit(name, prompt, COUNT, emitted=[token], offer=offer)
        is_good = await self.ahead.complete(request, offer, self.source)
        self.decode.submit(request, self.source if is_good else None)
        self.ahead.forget(name)
        return run_all(self.decode)

    def check_end(self) -> None:
        """Nobody holds anything, and every block that is cached holds what its name says."""
        for lease_id in list(self.prefill.core.exports.leases._leases):
            self.prefill.release_lease(lease_id)
        for engine in (self.prefill, self.decode):
            assert_nothing_held(engine)
        assert self.decode.core.imports._arrived_count == 0


@pytest.fixture
async def flow(make_engine: MakeEngine) -> AsyncIterator[Flow]:
    made = Flow(make_engine(max_batch_tokens=CHUNK), make_engine())
    yield made
    made.ahead.close()
    made.check_end()
    made.agents.close()


@pytest.mark.parametrize("length", [63, 64, 65, 200, 1000])
async def test_chunks_are_here_before_the_offer(length: int, flow: Flow, peer_of: PeerOf) -> None:
    prompt = prompt_of(length)
    flow.begin("a", prompt)
    token, offer = await flow.prefill_all("a", prompt)
    shown = [block for part in flow.parts for block in part.block_ids]
    assert shown == offer.block_ids[: len(shown)]
    assert len(shown) == (length - 1) // CHUNK * 4  # all but the last chunk
    assert flow.source.block_count == len(shown)
    answers = await flow.take("a", prompt, token, offer)
    assert [token, *answers.tokens("a")] == peer_of("llama").greedy(prompt, COUNT)
    assert flow.source.block_count == len(offer.block_ids)  # each once
    stats = answers.stats("a")
    assert (stats.cached_token_count, stats.transferred_token_count) == (0, length)
    assert stats.transferred_bytes == len(offer.block_ids) * 8192
    assert flow.decode.load().transferred_tokens_total == length


async def test_what_is_cached_at_either_end_is_not_pulled(flow: Flow, peer_of: PeerOf) -> None:
    prompt = prompt_of(400)
    flow.decode.submit(submit("warm", prompt[:100], 1))
    run_all(flow.decode)
    flow.prefill.submit(submit("warm", prompt[:200], 1))
    run_all(flow.prefill)
    flow.begin("a", prompt)
    token, offer = await flow.prefill_all("a", prompt)
    assert flow.parts[0].first_block == 0
    answers = await flow.take("a", prompt, token, offer)
    assert [token, *answers.tokens("a")] == peer_of("llama").greedy(prompt, COUNT)
    stats = answers.stats("a")
    assert (stats.cached_token_count, stats.transferred_token_count) == (96, 304)
    assert flow.source.block_count == 19


async def test_nobody_is_told_who_did_not_ask(flow: Flow) -> None:
    flow.prefill.submit(submit("a", prompt_of(300), COUNT, hand_over=True))
    await flow.prefill_all("a", prompt_of(300))
    assert not flow.parts


async def test_salts_are_kept_apart(flow: Flow, peer_of: PeerOf) -> None:
    prompt = prompt_of(200)
    flow.prefill.submit(submit("a", prompt, COUNT, hand_over=True, with_parts=True, cache_salt="one"))
    for _ in range(3):
        await flow.step("a", prompt, "one")
    flow.decode.submit(submit("b", prompt, COUNT))
    answers = run_all(flow.decode)
    assert answers.stats("b").cached_token_count == 0
    flow.decode.submit(submit("c", prompt, COUNT, cache_salt="one"))
    answers = run_all(flow.decode, answers)
    assert answers.stats("c").cached_token_count == 192
    assert answers.tokens("b") == answers.tokens("c") == peer_of("llama").greedy(prompt, COUNT)
    run_all(flow.prefill)


class TestTrouble:
    @pytest.mark.parametrize("place", [0, 3, 4, 9])
    @pytest.mark.parametrize("verdict", [Verdict.CORRUPT, Verdict.STALE, Verdict.LATE])
    async def test_a_block_does_not_arrive_ahead_and_comes_with_the_offer(
        self, place: int, verdict: Verdict, flow: Flow, peer_of: PeerOf
    ) -> None:
        prompt = prompt_of(300)
        flow.source.bad[place] = verdict
        flow.begin("a", prompt)
        token, offer = await flow.prefill_all("a", prompt)
        answers = await flow.take("a", prompt, token, offer)
        assert [token, *answers.tokens("a")] == peer_of("llama").greedy(prompt, COUNT)
        assert answers.stats("a").transferred_token_count == 300

    async def test_a_block_of_the_last_chunk_is_bad_and_the_rest_is_computed(self, flow: Flow, peer_of: PeerOf) -> None:
        prompt = prompt_of(250)
        flow.begin("a", prompt)
        token, offer = await flow.prefill_all("a", prompt)
        flow.source.bad[13] = Verdict.CORRUPT
        answers = await flow.take("a", prompt, token, offer)
        assert [token, *answers.tokens("a")] == peer_of("llama").greedy(prompt, COUNT)
        assert answers.stats("a").transferred_token_count == 13 * 16

    @pytest.mark.parametrize("steps", [0, 1, 2])
    async def test_the_link_breaks(self, steps: int, flow: Flow, peer_of: PeerOf) -> None:
        prompt = prompt_of(250)
        flow.begin("a", prompt)
        for _ in range(steps):
            await flow.step("a", prompt)
        flow.source.is_dead = True
        token, offer = await flow.prefill_all("a", prompt)
        answers = await flow.take("a", prompt, token, offer)
        assert [token, *answers.tokens("a")] == peer_of("llama").greedy(prompt, COUNT)
        assert answers.stats("a").transferred_token_count == 64 * steps

    async def test_the_prefill_worker_dies_and_what_it_had_computed_is_of_use(self, flow: Flow, peer_of: PeerOf) -> None:
        prompt = prompt_of(250)
        flow.begin("a", prompt)
        for _ in range(2):
            await flow.step("a", prompt)
        flow.prefill.abort("a")
        run_all(flow.prefill)
        flow.decode.submit(submit("a.2", prompt, COUNT))
        answers = run_all(flow.decode)
        assert answers.tokens("a.2") == peer_of("llama").greedy(prompt, COUNT)
        assert answers.stats("a.2").cached_token_count == 128
        flow.ahead.forget("a")

    async def test_blocks_that_were_given_to_another_are_not_taken(self, make_engine: MakeEngine, peer_of: PeerOf) -> None:
        """The request is cancelled after it told of blocks, and these are written anew before they are read."""
        flow = Flow(make_engine(max_batch_tokens=CHUNK, kv_bytes=16 * 8192), make_engine())
        prompt, real = prompt_of(200), flow.ahead
        flow.ahead = _Deaf()  # type: ignore[assignment]
        flow.begin("a", prompt)
        await flow.step("a", prompt)
        flow.prefill.abort("a")
        flow.prefill.submit(submit("other", prompt_of(250, 5), 2))
        run_all(flow.prefill)
        flow.ahead = real
        flow.ahead.add(PullAhead("a", prompt[:64], flow.parts[0]))
        await flow.settle("a")
        flow.ahead.forget("a")
        flow.decode.submit(submit("b", prompt, COUNT))
        answers = run_all(flow.decode)
        assert answers.stats("b").cached_token_count == 0
        assert answers.tokens("b") == peer_of("llama").greedy(prompt, COUNT)
        flow.ahead.close()
        flow.check_end()
        flow.agents.close()

    async def test_blocks_that_were_wiped_are_not_taken(self, flow: Flow, peer_of: PeerOf) -> None:
        """Numbers broke at the prefill worker after it had told of blocks: zeros are no KV."""
        prompt, real = prompt_of(200), flow.ahead
        flow.ahead = _Deaf()  # type: ignore[assignment]
        flow.begin("a", prompt)
        await flow.step("a", prompt)
        spoil_blocks(flow.prefill.kv_memory, flow.parts[0].block_ids)
        assert run_all(flow.prefill).reason("a") is FinishReason.ERROR
        flow.ahead = real
        flow.ahead.add(PullAhead("a", prompt[:64], flow.parts[0]))
        await flow.settle("a")
        flow.ahead.forget("a")
        flow.decode.submit(submit("b", prompt, COUNT))
        answers = run_all(flow.decode)
        assert answers.stats("b").cached_token_count == 0
        assert answers.tokens("b") == peer_of("llama").greedy(prompt, COUNT)

    async def test_parts_that_do_not_fit_are_ignored(self, flow: Flow) -> None:
        prompt = prompt_of(300)
        flow.begin("a", prompt)
        await flow.step("a", prompt)
        part = flow.parts[0]
        region = part.agent.regions[0]
        assert region.layout is not None
        foreign = msgspec.structs.replace(region, layout=msgspec.structs.replace(region.layout, fingerprint="another"))
        before = flow.source.block_count
        for name, bad in enumerate(
            [
                msgspec.structs.replace(part, first_block=2),
                msgspec.structs.replace(part, generations=part.generations[1:]),
                msgspec.structs.replace(part, region_id="nobody's"),
                msgspec.structs.replace(part, agent=msgspec.structs.replace(part.agent, regions=[foreign])),
                msgspec.structs.replace(part, block_ids=[10**6] * 4),
            ]
        ):
            flow.ahead.add(PullAhead(f"bad {name}", prompt_of(64, 9), bad))
            await flow.settle(f"bad {name}")
            flow.ahead.forget(f"bad {name}")
        assert flow.source.block_count == before
        flow.prefill.abort("a")
        run_all(flow.prefill)
        flow.ahead.forget("a")

    async def test_other_tokens_under_the_same_name(self, flow: Flow, peer_of: PeerOf) -> None:
        """Parts of one prompt, a submit with another: what came ahead is not taken for its own."""
        flow.begin("a", prompt_of(200))
        token, offer = await flow.prefill_all("a", prompt_of(200))
        flow.prefill.submit(submit("b", prompt_of(200, 1), COUNT, hand_over=True))
        token, offer = await flow.prefill_all("b", prompt_of(200, 1))
        answers = await flow.take("a", prompt_of(200, 1), token, offer)
        assert [token, *answers.tokens("a")] == peer_of("llama").greedy(prompt_of(200, 1), COUNT)


class _Deaf:
    _streams: dict[str, object] = {}  # noqa: RUF012  nothing is ever in it

    def add(self, message: PullAhead) -> None:
        """Somebody who has not come round to it yet."""


class TestRoom:
    async def test_a_full_worker_pulls_nothing_and_takes_the_request_later(self, make_engine: MakeEngine, peer_of: PeerOf) -> None:
        flow = Flow(make_engine(max_batch_tokens=CHUNK), make_engine(kv_bytes=24 * 8192))
        flow.decode.submit(submit("running", prompt_of(250, 3), 60))
        flow.decode.step()
        prompt = prompt_of(250)
        flow.begin("a", prompt)
        token, offer = await flow.prefill_all("a", prompt)
        assert flow.source.block_count <= 7  # of what is free; nobody's running work is taken
        answers = await flow.take("a", prompt, token, offer)
        assert [token, *answers.tokens("a")] == peer_of("llama").greedy(prompt, COUNT)
        assert answers.tokens("running") == peer_of("llama").greedy(prompt_of(250, 3), 60)[-len(answers.tokens("running")) :]
        assert flow.decode.load().preemptions_total == 0
        flow.ahead.close()
        flow.check_end()
        flow.agents.close()

    async def test_two_prompts_of_which_only_one_fits_do_not_block_each_other(self, make_engine: MakeEngine, peer_of: PeerOf) -> None:
        flow = Flow(make_engine(max_batch_tokens=CHUNK), make_engine(kv_bytes=20 * 8192))
        prompts = {"a": prompt_of(250, 1), "b": prompt_of(250, 2)}
        for name, prompt in prompts.items():
            flow.begin(name, prompt)
        ends: dict[str, tuple[int, KvOffer]] = {}
        while len(ends) < 2:
            report = flow.prefill.step()
            assert report is not None
            for output in report.outputs:
                name = output.request_id
                if output.part is not None:
                    first, end = output.part.first_block, output.part.first_block + len(output.part.block_ids)
                    flow.ahead.add(PullAhead(name, prompts[name][16 * first : 16 * end], output.part))
                    await flow.settle(name)
                if output.offer is not None:
                    ends[name] = output.token_ids[0], output.offer
        for name, (token, offer) in ends.items():
            answers = await flow.take(name, prompts[name], token, offer)
            assert [token, *answers.tokens(name)] == peer_of("llama").greedy(prompts[name], COUNT)
        flow.ahead.close()
        flow.check_end()
        flow.agents.close()

    async def test_running_sequences_take_what_came_ahead_when_they_need_it(self, make_engine: MakeEngine, peer_of: PeerOf) -> None:
        flow = Flow(make_engine(max_batch_tokens=CHUNK), make_engine(kv_bytes=20 * 8192))
        prompt = prompt_of(250)
        flow.begin("a", prompt)
        token, offer = await flow.prefill_all("a", prompt)
        assert flow.source.block_count == 12
        flow.decode.submit(submit("running", prompt_of(280, 3), 20))
        assert len(run_all(flow.decode).tokens("running")) == 20
        answers = await flow.take("a", prompt, token, offer)
        assert [token, *answers.tokens("a")] == peer_of("llama").greedy(prompt, COUNT)
        flow.ahead.close()
        flow.check_end()
        flow.agents.close()
