"""A prefix that another engine has cached is pulled ahead of a request; whatever becomes of that, tokens are right and nothing is held."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, cast

import msgspec
import pytest

from polyphase.core.errors import WorkerLost
from polyphase.core.ids import ContentKey
from polyphase.engines.torch.engine import TorchEngine
from polyphase.transfer import Verdict
from polyphase.wire.kv import KvPart
from polyphase.wire.requests import KvHolder
from polyphase.worker.holders import Holders
from polyphase.worker.pulls_ahead import PullsAhead
from polyphase.worker.sources import OfferSources
from tests.unit.engine.agents import AgentPair
from tests.unit.engine.test_flow import Source
from tests.unit.engine.tiny import Answers, Peer, assert_nothing_held, prompt_of, run_all, submit

MakeEngine = Callable[..., TorchEngine]
PeerOf = Callable[[str], Peer]
COUNT = 8


class Asked:
    """Stands for `Holders`: asks the other engine directly."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine = engine
        self.questions: list[tuple[int, int]] = []  # first block, and how many
        self.silent: list[KvHolder] = []
        self.is_dead = False
        self.change: Callable[[KvPart], KvPart] = lambda part: part

    def is_silent(self, holder: KvHolder) -> bool:
        return holder in self.silent

    def note_silence(self, holder: KvHolder) -> None:
        self.silent.append(holder)

    async def find(self, holder: KvHolder, first_block: int, keys: Sequence[ContentKey], timeout_s: float) -> KvPart:
        self.questions.append((first_block, len(keys)))
        if self.is_dead:
            raise WorkerLost("it does not answer")
        return self.change(self.engine.find_blocks(first_block, keys))


class Slow(Source):
    """Reads wait until they are let go."""

    def __init__(self, real: Any) -> None:
        super().__init__(real)
        self.gate = threading.Event()
        self.gate.set()

    def read_blocks(self, *arguments: Any) -> bytes:
        self.gate.wait(10)
        return super().read_blocks(*arguments)


class Two:
    """An engine that holds prefixes and one that wants them."""

    def __init__(self, holder: TorchEngine, reader: TorchEngine) -> None:
        self.holder, self.reader = holder, reader
        self.agents = AgentPair(holder, reader)
        self.source = Slow(self.agents.source)
        self.ahead = PullsAhead(reader, reader, cast("OfferSources", self.source))
        self.asked = Asked(holder)

    def warm(self, prompt: list[int], **fields: Any) -> None:
        self.holder.submit(submit("warm", prompt, 1, **fields))
        run_all(self.holder)

    async def serve(
        self, prompt: list[int], *, emitted: list[int] | None = None, compute_ms: float | None = 60_000, **fields: Any
    ) -> Answers:
        """As the host does."""
        holder = KvHolder("h", 1, "ipc://h", len(prompt), compute_ms)
        request = submit("a", prompt, COUNT, emitted=emitted, holder=holder, **fields)
        await self.ahead.pull_held(request, holder, cast("Holders", self.asked))
        self.reader.submit(request)
        self.ahead.forget("a")
        return run_all(self.reader)

    def close(self) -> None:
        self.ahead.close()
        for engine in (self.holder, self.reader):
            assert_nothing_held(engine)
        assert self.reader.core.imports._arrived_count == 0
        self.agents.close()


@pytest.fixture
async def two(make_engine: MakeEngine) -> AsyncIterator[Two]:
    made = Two(make_engine(), make_engine())
    yield made
    made.source.gate.set()
    while made.reader.load().used_block_count:  # noqa: ASYNC110  reads under way go on to their end
        await asyncio.sleep(0.001)
    made.close()


def came(answers: Answers) -> tuple[int, int]:
    stats = answers.stats("a")
    return stats.cached_token_count, stats.transferred_token_count


@pytest.mark.parametrize("length", [16, 17, 33, 300, 2100])
async def test_all_full_blocks_but_the_last_token_s_are_pulled(length: int, two: Two, peer_of: PeerOf) -> None:
    prompt = prompt_of(length)
    two.warm(prompt)
    answers = await two.serve(prompt)
    assert answers.tokens("a") == peer_of("llama").greedy(prompt, COUNT)
    full = (length - 1) // 16 * 16
    assert came(answers) == (0, full)
    assert answers.stats("a").transferred_bytes == full // 16 * 8192
    assert two.holder.load().leased_block_count == 0


async def test_only_what_is_missing_is_asked_for_and_what_was_emitted_counts(two: Two, peer_of: PeerOf) -> None:
    prompt = prompt_of(200)
    wanted = peer_of("llama").greedy(prompt, COUNT)
    two.warm(prompt + wanted[:6])
    two.reader.submit(submit("before", prompt[:100], 1))
    run_all(two.reader)
    answers = await two.serve(prompt, emitted=wanted[:5])
    assert answers.tokens("a") == wanted[5:]
    assert two.asked.questions == [(6, 6)]
    assert came(answers) == (96, 96)


async def test_what_is_here_already_is_not_asked_for(two: Two) -> None:
    prompt = prompt_of(100)
    two.reader.submit(submit("before", prompt, 1))
    run_all(two.reader)
    assert came(await two.serve(prompt)) == (96, 0)
    assert two.asked.questions == []


async def test_a_holder_has_less_than_was_said(two: Two, peer_of: PeerOf) -> None:
    prompt = prompt_of(300)
    two.warm(prompt[:120])
    answers = await two.serve(prompt)
    assert answers.tokens("a") == peer_of("llama").greedy(prompt, COUNT)
    assert came(answers) == (0, 112)


@pytest.mark.parametrize(("theirs", "mine"), [("one", None), ("one", "two"), (None, "one"), ("one", "one")])
async def test_salts_are_kept_apart(theirs: str | None, mine: str | None, two: Two) -> None:
    prompt = prompt_of(100)
    two.warm(prompt, cache_salt=theirs)
    assert came(await two.serve(prompt, cache_salt=mine)) == (0, 96 if theirs == mine else 0)


async def test_blocks_of_an_adapter_are_not_those_of_the_model(two: Two) -> None:
    prompt = prompt_of(100)
    two.warm(prompt)
    holder = KvHolder("h", 1, "ipc://h", 100, 60_000)
    await two.ahead.pull_held(submit("a", prompt, lora="x"), holder, cast("Holders", two.asked))
    two.ahead.forget("a")
    assert two.asked.questions == [(0, 6)]
    assert two.source.block_count == 0


async def test_what_was_found_is_forgotten_last(make_engine: MakeEngine) -> None:
    """It is not kept, but whoever asked should have the time to read it."""
    engine = make_engine(kv_bytes=32 * 8192)
    pair = AgentPair(engine, engine)
    old, new = prompt_of(160, 1), prompt_of(160, 2)
    for name, prompt in (("old", old), ("new", new)):
        engine.submit(submit(name, prompt, 1))
        run_all(engine)
    keys = engine.core._cache.open(old, None).chain.keys
    assert len(engine.find_blocks(0, keys).block_ids) == 10
    engine.submit(submit("more", prompt_of(200, 3), 1))
    run_all(engine)
    assert len(engine.find_blocks(0, keys).block_ids) == 10
    assert len(engine.find_blocks(0, engine.core._cache.open(new, None).chain.keys).block_ids) < 10
    assert engine.find_blocks(3, keys[3:5]).first_block == 3
    assert_nothing_held(engine)
    pair.close()


class TestTrouble:
    @pytest.mark.parametrize("verdict", [Verdict.CORRUPT, Verdict.STALE, Verdict.LATE])
    @pytest.mark.parametrize("place", [0, 5])
    async def test_a_block_is_bad(self, place: int, verdict: Verdict, two: Two, peer_of: PeerOf) -> None:
        prompt = prompt_of(200)
        two.warm(prompt)
        two.source.bad[place] = verdict
        answers = await two.serve(prompt)
        assert answers.tokens("a") == peer_of("llama").greedy(prompt, COUNT)
        assert came(answers) == (0, 16 * place)

    async def test_blocks_are_given_away_between_answer_and_read(self, make_engine: MakeEngine, peer_of: PeerOf) -> None:
        two = Two(make_engine(kv_bytes=16 * 8192), make_engine())
        prompt = prompt_of(100)
        two.warm(prompt)

        def overwrite(part: KvPart) -> KvPart:
            assert len(part.block_ids) == 6
            two.warm(prompt_of(250, 7))
            return part

        two.asked.change = overwrite
        answers = await two.serve(prompt)
        assert answers.tokens("a") == peer_of("llama").greedy(prompt, COUNT)
        assert came(answers) == (0, 0)
        two.close()

    async def test_it_does_not_answer(self, two: Two, peer_of: PeerOf) -> None:
        two.asked.is_dead = True
        prompt = prompt_of(100)
        answers = await two.serve(prompt)
        assert answers.tokens("a") == peer_of("llama").greedy(prompt, COUNT)
        assert came(answers) == (0, 0)

    async def test_one_that_is_silent_is_not_asked(self, two: Two) -> None:
        prompt = prompt_of(100)
        two.warm(prompt)
        two.asked.silent.append(KvHolder("h", 1, "ipc://h", 100, 60_000))
        assert came(await two.serve(prompt)) == (0, 0)
        assert two.asked.questions == []

    async def test_the_link_breaks(self, two: Two, peer_of: PeerOf) -> None:
        prompt = prompt_of(100)
        two.warm(prompt)
        two.source.is_dead = True
        answers = await two.serve(prompt)
        assert answers.tokens("a") == peer_of("llama").greedy(prompt, COUNT)
        assert came(answers) == (0, 0)

    async def test_reading_is_slower_than_computing(self, two: Two, peer_of: PeerOf) -> None:
        """The request goes on; what arrives later is good for the next one."""
        prompt = prompt_of(100)
        two.warm(prompt)
        two.source.gate.clear()
        answers = await two.serve(prompt, compute_ms=1)
        assert answers.tokens("a") == peer_of("llama").greedy(prompt, COUNT)
        assert came(answers) == (0, 0)
        assert answers.stats("a").queue_ms < 5000
        assert len(two.asked.silent) == 1, "nothing came at all: it is not asked again for a while"

    async def test_a_cancel_while_blocks_are_on_their_way_leaves_nothing(self, two: Two) -> None:
        prompt = prompt_of(100)
        two.warm(prompt)
        two.source.gate.clear()
        holder = KvHolder("h", 1, "ipc://h", 100, 60_000)
        request = submit("a", prompt, COUNT)
        task = asyncio.create_task(two.ahead.pull_held(request, holder, cast("Holders", two.asked)))
        while not two.reader.load().used_block_count:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        two.ahead.forget("a")
        two.source.gate.set()
        while two.reader.load().used_block_count:  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    async def test_answers_that_do_not_fit_are_not_used(self, two: Two, peer_of: PeerOf) -> None:
        prompt = prompt_of(100)
        two.warm(prompt)
        wanted = peer_of("llama").greedy(prompt, COUNT)

        def foreign(part: KvPart) -> KvPart:
            region = part.agent.regions[0]
            assert region.layout is not None
            other = msgspec.structs.replace(region, layout=msgspec.structs.replace(region.layout, fingerprint="another"))
            return msgspec.structs.replace(part, agent=msgspec.structs.replace(part.agent, regions=[other]))

        changes: list[Callable[[KvPart], KvPart]] = [
            foreign,
            lambda part: msgspec.structs.replace(part, first_block=1),
            lambda part: msgspec.structs.replace(part, generations=part.generations[1:]),
            lambda part: msgspec.structs.replace(part, region_id="nobody's"),
            lambda part: msgspec.structs.replace(part, block_ids=part.block_ids * 2, generations=part.generations * 2),
        ]
        for place, change in enumerate(changes):
            two.asked.change = change
            answers = await two.serve(prompt, cache_salt=None)
            assert answers.tokens("a") == wanted
            assert answers.stats("a").transferred_token_count == 0, place
            two.reader.core.pool.release(two.reader.core.pool.allocate(two.reader.core.pool.available_count))  # forget the prompt
        assert two.source.block_count == 0
