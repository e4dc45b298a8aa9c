"""The tests that every adapter to an engine must pass, for ours and for yours. Needs pytest and pytest-asyncio.

    from polyphase.testing.engines import EngineConformance

    class TestMyEngine(EngineConformance):
        @pytest.fixture
        def engine(self):
            with closing(load_my_engine(EngineOptions(model="demo"))) as engine:
                yield engine

An engine that only answers what it knows, because it is played from recordings, says with `prompt` and `long_token_count` what to ask for.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import pytest

from polyphase.core.errors import RequestError
from polyphase.core.hashing import sequence_hashes
from polyphase.engines.interface import Ability, Engine, KvExporter, KvSender, Sleeper, StepReport, abilities_of
from polyphase.text import Tokenizer
from polyphase.wire.cards import BLOCKS
from polyphase.wire.events import AllCleared, BlocksRemoved, BlocksStored
from polyphase.wire.requests import FinishReason, Grammar, GrammarKind, SamplingParams, SequenceOutput, StopConditions, Submit

TIMEOUT_S = 60.0


class EngineRun:
    """An engine that steps, and all that it has reported. Every request is held to exactly one end."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.reports: list[StepReport] = []
        self.held: set[int] = set()  # sequence hashes, by its events
        self._outputs: dict[str, list[SequenceOutput]] = {}
        self._changed = asyncio.Event()

    def on_step(self, report: StepReport) -> None:
        assert not self.reports or report.step >= self.reports[-1].step, "steps are counted upwards"
        self.reports.append(report)
        seen: set[str] = set()
        for output in report.outputs:
            assert output.request_id not in seen, "one output for each request in a report"
            seen.add(output.request_id)
            earlier = self._outputs.setdefault(output.request_id, [])
            assert all(one.finish_reason is None for one in earlier), f"{output.request_id} goes on after its end"
            earlier.append(output)
        for event in report.events:
            match event:
                case BlocksStored():
                    self.held |= set(event.sequence_hashes)
                case BlocksRemoved():
                    self.held -= set(event.sequence_hashes)
                case AllCleared():
                    self.held.clear()
        self._changed.set()

    async def until(self, condition: Callable[[], Any], what: str) -> None:
        """Raises: AssertionError after a generous time."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while not condition():
                    await self._changed.wait()
                    self._changed.clear()
        except TimeoutError:
            raise AssertionError(f"waited in vain for {what}; load: {self.engine.load()}") from None

    def outputs(self, request_id: str) -> list[SequenceOutput]:
        return self._outputs.get(request_id, [])

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs(request_id) for token in output.token_ids]

    def has_ended(self, request_id: str) -> bool:
        return any(output.finish_reason is not None for output in self.outputs(request_id))

    async def end(self, request_id: str) -> SequenceOutput:
        await self.until(lambda: self.has_ended(request_id), f"the end of {request_id}")
        return self.outputs(request_id)[-1]


@asynccontextmanager
async def stepping(engine: Engine) -> AsyncIterator[EngineRun]:
    """The engine's `run`, cancelled at the end; what it raises is raised here."""
    run = EngineRun(engine)
    task = asyncio.create_task(engine.run(run.on_step), name="engine")
    await asyncio.sleep(0)
    try:
        yield run
    finally:
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.result()


class EngineConformance:
    """Subclass it with a fixture `engine`; see the top of the module."""

    prompt: ClassVar[list[int]] = list(range(100, 200))
    long_token_count: ClassVar[int] = 40  # of output, for requests that are broken off
    short_token_count: ClassVar[int] = 6

    def request(self, request_id: str, max_tokens: int | None = None, **fields: Any) -> Submit:
        """Greedy tokens behind `prompt`."""
        stop = fields.pop("stop", None) or StopConditions(max_tokens=max_tokens or self.short_token_count, ignore_eos=True)
        given = {"token_ids": self.prompt, "prompt_token_count": len(self.prompt), "sampling": SamplingParams(seed=1, temperature=0.0)}
        return Submit(request_id=request_id, stop=stop, **{**given, **fields})

    def test_the_card_tells_its_limits(self, engine: Engine) -> None:
        card = engine.card
        assert card.name
        assert card.engine
        assert card.tokenizer_json
        assert min(card.block_size, card.block_count, card.context_length, card.max_batch_tokens, card.max_running, card.vocab_size) > 0
        assert all(0 <= token_id < card.vocab_size for token_id in card.eos_token_ids)
        assert engine.load().block_count == card.block_count

    @pytest.mark.asyncio
    async def test_tokens_come_and_the_end_says_why(self, engine: Engine) -> None:
        async with stepping(engine) as run:
            engine.submit(self.request("a"))
            end = await run.end("a")
        assert end.finish_reason is FinishReason.LENGTH
        assert len(run.tokens("a")) == self.short_token_count
        assert all(0 <= token < engine.card.vocab_size for token in run.tokens("a"))
        assert run.reports[-1].step > 0
        assert engine.load().generated_tokens_total >= self.short_token_count

    @pytest.mark.asyncio
    async def test_greedy_tokens_repeat_and_the_cache_is_told(self, engine: Engine) -> None:
        async with stepping(engine) as run:
            for request_id in ("a", "b"):
                engine.submit(self.request(request_id))
                await run.end(request_id)
            full = len(self.prompt) // engine.card.block_size
            names = sequence_hashes(self.prompt, engine.card.block_size)[:full]
            if engine.card.publishes_events:
                await run.until(lambda: set(names) <= run.held, "the events of the prompt's blocks")
        assert run.tokens("a") == run.tokens("b")
        stats = [output.stats for output in run.outputs("b") if output.stats is not None]
        assert len(stats) <= 1, "told once"
        cached = stats[0].cached_token_count if stats else 0
        assert cached < len(self.prompt), "one token at least is computed"
        assert cached or not engine.card.publishes_events, "only who keeps nothing has nothing to tell"

    @pytest.mark.asyncio
    async def test_a_request_goes_on_from_what_was_emitted_elsewhere(self, engine: Engine) -> None:
        async with stepping(engine) as run:
            engine.submit(self.request("whole"))
            await run.end("whole")
            tokens = run.tokens("whole")
            engine.submit(self.request("rest", token_ids=self.prompt + tokens[:2]))
            await run.end("rest")
        assert tokens[:2] + run.tokens("rest") == tokens

    @pytest.mark.asyncio
    async def test_a_sampled_request_goes_on_with_its_tokens_where_the_card_says_so(self, engine: Engine) -> None:
        if not engine.card.resumes_sampling:
            return
        sampling = SamplingParams(seed=1, temperature=1.0)
        async with stepping(engine) as run:
            engine.submit(self.request("whole", sampling=sampling))
            await run.end("whole")
            tokens = run.tokens("whole")
            engine.submit(self.request("rest", sampling=sampling, token_ids=self.prompt + tokens[:2]))
            await run.end("rest")
        assert tokens[:2] + run.tokens("rest") == tokens

    @pytest.mark.asyncio
    async def test_a_stop_token_ends_it_and_is_part_of_it(self, engine: Engine) -> None:
        async with stepping(engine) as run:
            engine.submit(self.request("a"))
            await run.end("a")
            last = run.tokens("a")[2]
            stop = StopConditions(max_tokens=self.short_token_count, ignore_eos=True, stop_token_ids=[last])
            engine.submit(self.request("b", stop=stop))
            end = await run.end("b")
        tokens = run.tokens("a")
        assert run.tokens("b") == tokens[: tokens.index(last) + 1]
        assert (end.finish_reason, end.stop_reason) == (FinishReason.STOP, last)

    @pytest.mark.asyncio
    async def test_logprobs_belong_to_the_tokens(self, engine: Engine) -> None:
        async with stepping(engine) as run:
            engine.submit(self.request("a", sampling=SamplingParams(seed=1, temperature=0.0, top_logprobs=2)))
            await run.end("a")
        found = [one for output in run.outputs("a") for one in output.logprobs or []]
        assert [one.token_id for one in found] == run.tokens("a")
        assert all(one.logprob <= 0 for one in found)
        assert all(one.top[0][0] == one.token_id and abs(one.top[0][1] - one.logprob) < 1e-4 for one in found), "greedy: the most probable"
        assert all(len(one.top) <= 2 and one.top == sorted(one.top, key=lambda pair: -pair[1]) for one in found)

    @pytest.mark.asyncio
    async def test_an_abort_ends_it_at_once_and_frees_everything(self, engine: Engine) -> None:
        async with stepping(engine) as run:
            engine.submit(self.request("a", self.long_token_count))
            await run.until(lambda: run.tokens("a"), "the first token")
            engine.abort("a")
            engine.abort("unknown")
            end = await run.end("a")
        assert end.finish_reason in (FinishReason.CANCELLED, FinishReason.LENGTH), "it may have ended first"
        load = engine.load()
        assert (load.running_count, load.waiting_count, load.waiting_prefill_tokens) == (0, 0, 0)

    @pytest.mark.asyncio
    async def test_a_request_that_is_handed_over_tells_all_its_tokens(self, engine: Engine) -> None:
        async with stepping(engine) as run:
            engine.submit(self.request("a", self.long_token_count))
            await run.until(lambda: run.tokens("a"), "the first token")
            engine.hand_over("a")
            engine.hand_over("unknown")
            end = await run.end("a")
        assert end.finish_reason in (FinishReason.HANDED_OVER, FinishReason.LENGTH), "it may have ended first"
        if not engine.card.can_hand_over:
            assert end.offer is None

    grammar: ClassVar[Grammar] = Grammar(GrammarKind.REGEX, "[a-c]{4}-[0-9]{4}")
    sentence: ClassVar[str] = r"[a-c]{4}-[0-9]{4}"

    def structured(self, request_id: str, emitted: Sequence[int] = ()) -> Submit:
        stop = StopConditions(max_tokens=self.long_token_count)
        return self.request(request_id, stop=stop, grammar=self.grammar, token_ids=[*self.prompt, *emitted])

    @pytest.mark.asyncio
    async def test_structured_output_is_what_was_wanted_or_refused(self, engine: Engine) -> None:
        """The card says which; output that fits no grammar is worse than none."""
        if not engine.card.takes_grammars:
            with pytest.raises(RequestError):
                engine.submit(self.structured("a"))
            return
        async with stepping(engine) as run:
            engine.submit(self.structured("a"))
            engine.submit(self.request("free"))
            end = await run.end("a")
            await run.end("free")
        assert end.finish_reason is FinishReason.STOP
        tokens = [token for token in run.tokens("a") if token not in engine.card.eos_token_ids]
        said = Tokenizer.from_json(engine.card.tokenizer_json).decode(tokens)
        assert re.fullmatch(self.sentence, said), said

    @pytest.mark.asyncio
    async def test_structured_output_goes_on_from_elsewhere_or_is_refused(self, engine: Engine) -> None:
        if not engine.card.takes_grammars or not engine.card.resumes_grammars:
            with pytest.raises(RequestError):
                engine.submit(self.structured("a", self.prompt[:2]))
            return
        async with stepping(engine) as run:
            engine.submit(self.structured("whole"))
            await run.end("whole")
            tokens = run.tokens("whole")
            engine.submit(self.structured("rest", tokens[:3]))
            await run.end("rest")
        assert tokens[:3] + run.tokens("rest") == tokens

    def test_what_never_fits_is_refused(self, engine: Engine) -> None:
        too_long = [1] * engine.card.context_length
        with pytest.raises(RequestError):
            engine.submit(self.request("a", token_ids=too_long, prompt_token_count=len(too_long)))
        load = engine.load()
        assert (load.running_count, load.waiting_count) == (0, 0)

    def test_abilities_are_whole(self, engine: Engine) -> None:
        """Who says that KV can be handed over has what the worker needs for it."""
        card = engine.card
        if card.can_hand_over:
            assert card.offer_kind, "who makes offers takes them"
            assert isinstance(engine, KvExporter if card.offer_kind == BLOCKS else KvSender)
        assert not card.can_sleep or isinstance(engine, Sleeper)
        assert (Ability.HAND_OVER in abilities_of(engine)) == engine.card.can_hand_over
        assert (Ability.STRUCTURED_OUTPUT in abilities_of(engine)) == engine.card.takes_grammars
