"""What a worker relies on: ends, stops, refusals, cancellation, faults, load, and the asynchronous loop around it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

from polyphase.core.errors import ContextLengthExceeded, InvalidRequest, Overloaded
from polyphase.core.hashing import sequence_hashes
from polyphase.engines.interface import StepReport
from polyphase.engines.torch.attention import PackedAttention
from polyphase.engines.torch.engine import TorchEngine
from polyphase.wire.events import BlocksRemoved, BlocksStored
from polyphase.wire.requests import FinishReason, SamplingParams, StopConditions
from tests.unit.engine.tiny import CONTEXT_LENGTH, VOCAB_SIZE, Answers, Peer, assert_nothing_held, prompt_of, run_all, submit

MakeEngine = Callable[..., TorchEngine]
PeerOf = Callable[[str], Peer]


def always(token_id: int, **fields: Any) -> SamplingParams:
    """Sampling that can only choose one token."""
    return SamplingParams(seed=0, temperature=0, logit_bias={token_id: 1000.0}, **fields)


def letter(text: str) -> int:
    return ord(text) - ord("!")  # the tiny tokenizer's alphabet is sorted, and begins there


class TestStopping:
    def test_max_tokens(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        engine.submit(submit("a", prompt_of(5), 3))
        answers = run_all(engine)
        assert len(answers.tokens("a")) == 3
        assert answers.reason("a") is FinishReason.LENGTH

    def test_eos_is_part_of_the_output(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        eos = engine.card.eos_token_ids[0]
        engine.submit(submit("a", prompt_of(5), sampling=always(eos), stop=StopConditions(max_tokens=9)))
        answers = run_all(engine)
        assert answers.tokens("a") == [eos]
        assert answers.reason("a") is FinishReason.STOP
        assert answers.end("a").stop_reason is None

    def test_ignored_eos_is_a_token_like_others(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        eos = engine.card.eos_token_ids[0]
        engine.submit(submit("a", prompt_of(5), sampling=always(eos), stop=StopConditions(max_tokens=4, ignore_eos=True)))
        assert run_all(engine).tokens("a") == [eos] * 4

    def test_stop_token(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        engine.submit(submit("a", prompt_of(5), sampling=always(9), stop=StopConditions(max_tokens=4, stop_token_ids=[9])))
        answers = run_all(engine)
        assert answers.tokens("a") == [9]
        assert answers.end("a").stop_reason == 9

    def test_min_tokens_holds_stop_tokens_back(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        stop = StopConditions(max_tokens=9, min_tokens=3, stop_token_ids=[9])
        engine.submit(submit("a", prompt_of(5), sampling=always(9), stop=stop))
        tokens = run_all(engine).tokens("a")
        assert len(tokens) == 4
        assert 9 not in tokens[:3]
        assert tokens[3] == 9

    def test_stop_string_over_several_tokens(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        stop = StopConditions(max_tokens=9, stop_strings=["zz", "aaa"])
        engine.submit(submit("a", prompt_of(5), sampling=always(letter("a")), stop=stop))
        answers = run_all(engine)
        assert answers.tokens("a") == [letter("a")] * 3
        assert answers.end("a").stop_reason == "aaa"

    def test_stop_string_that_began_on_another_worker(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        stop = StopConditions(max_tokens=9, stop_strings=["aaa"])
        engine.submit(submit("a", prompt_of(5), emitted=[letter("a")] * 2, sampling=always(letter("a")), stop=stop))
        assert len(run_all(engine).tokens("a")) == 1

    def test_stop_string_does_not_look_into_the_prompt(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        stop = StopConditions(max_tokens=9, stop_strings=["aaa"])
        engine.submit(submit("a", [letter("a")] * 5, sampling=always(letter("a")), stop=stop))
        assert len(run_all(engine).tokens("a")) == 3

    def test_the_end_of_the_context(self, make_engine: MakeEngine) -> None:
        engine = make_engine(context_length=32)
        engine.submit(submit("a", prompt_of(30), 100))
        answers = run_all(engine)
        assert len(answers.tokens("a")) == 2
        assert answers.reason("a") is FinishReason.LENGTH
        assert_nothing_held(engine)


class TestRefusal:
    def test_a_prompt_beyond_the_context(self, make_engine: MakeEngine) -> None:
        engine = make_engine(context_length=32)
        with pytest.raises(ContextLengthExceeded, match="the prompt has 32 tokens and the model's context is 32"):
            engine.submit(submit("a", prompt_of(32)))
        assert engine.load().waiting_count == 0

    @pytest.mark.parametrize("prompt", [[-1], [VOCAB_SIZE], []])
    def test_tokens_that_do_not_exist(self, prompt: list[int], make_engine: MakeEngine) -> None:
        with pytest.raises(InvalidRequest):
            make_engine().submit(submit("a", prompt))

    def test_bias_on_a_token_that_does_not_exist(self, make_engine: MakeEngine) -> None:
        with pytest.raises(InvalidRequest, match="logit_bias"):
            make_engine().submit(submit("a", [1], sampling=always(VOCAB_SIZE)))

    def test_the_same_id_twice(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        engine.submit(submit("a", [1]))
        with pytest.raises(InvalidRequest, match="running already"):
            engine.submit(submit("a", [1]))

    def test_a_full_queue(self, make_engine: MakeEngine) -> None:
        engine = make_engine(max_waiting=2)
        for name in "ab":
            engine.submit(submit(name, [1]))
        with pytest.raises(Overloaded):
            engine.submit(submit("c", [1]))
        assert set(run_all(engine).outputs) == {"a", "b"}


class TestCancellation:
    def test_waiting_running_and_unknown(self, make_engine: MakeEngine) -> None:
        engine = make_engine(max_running=1)
        engine.submit(submit("runs", prompt_of(40), 100))
        engine.submit(submit("waits", prompt_of(40), 100))
        answers = Answers()
        for _ in range(3):
            report = engine.step()
            assert report is not None
            answers.add(report)
        for name in ("runs", "waits", "unknown"):
            engine.abort(name)
        assert engine.load().used_block_count == 0  # at once, not at the next step
        run_all(engine, answers)
        assert answers.reason("runs") is answers.reason("waits") is FinishReason.CANCELLED
        assert "unknown" not in answers.outputs
        assert_nothing_held(engine)

    def test_during_a_step(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        engine.submit(submit("a", prompt_of(40), 100))
        engine.submit(submit("b", prompt_of(41), 2))
        original = engine._runner.forward

        def forward(*args: Any) -> Any:
            engine.abort("a")
            return original(*args)

        engine._runner.forward = forward  # type: ignore[method-assign]
        answers = run_all(engine)
        assert answers.tokens("a") == []
        assert answers.reason("a") is FinishReason.CANCELLED
        assert len(answers.tokens("b")) == 2
        assert_nothing_held(engine)

    @pytest.mark.parametrize("long_count", [300, 30])
    def test_a_step_that_nobody_wants_is_broken_off(self, make_engine: MakeEngine, peer_of: PeerOf, long_count: int) -> None:
        engine = make_engine(max_batch_tokens=400)
        engine.submit(submit("other", prompt_of(17), 6))
        answers = Answers()
        for _ in range(2):
            report = engine.step()
            assert report is not None
            answers.add(report)
        engine.submit(submit("long", prompt_of(long_count), 100))
        engine.submit(submit("short", prompt_of(100), 2))
        attention, layers = PackedAttention.attend, []

        def attend(self: PackedAttention, layer: int, *args: Any) -> Any:
            layers.append(layer)
            engine.abort("long")
            return attention(self, layer, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PackedAttention, "attend", attend)
            report = engine.step()
        assert report is not None
        answers.add(report)
        # The long prompt is most of the step in the first case only: then the others' few tokens are computed again.
        assert (layers == [0]) == (long_count == 300)
        assert answers.reason("long") is FinishReason.CANCELLED
        run_all(engine, answers)
        assert answers.tokens("other") == peer_of("llama").greedy(prompt_of(17), 6)
        assert answers.tokens("short") == peer_of("llama").greedy(prompt_of(100), 2)
        assert_nothing_held(engine)


class TestFaults:
    def test_a_step_that_raises_ends_its_requests_and_no_others(self, make_engine: MakeEngine, peer_of: PeerOf) -> None:
        engine = make_engine(max_running=1)
        engine.submit(submit("bad", prompt_of(40)))
        engine.submit(submit("good", prompt_of(41)))
        original, calls = engine._runner.forward, 0

        def forward(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise RuntimeError("the accelerator is on fire")
            return original(*args)

        engine._runner.forward = forward  # type: ignore[method-assign]
        answers = run_all(engine)
        end = answers.end("bad")
        assert end.finish_reason is FinishReason.ERROR
        assert end.failure is not None
        assert end.failure.code == "engine_failed"
        assert "on fire" in end.failure.message
        assert answers.tokens("good") == peer_of("llama").greedy(prompt_of(41), 8)
        assert_nothing_held(engine)

    def test_logits_that_are_not_numbers_end_one_request_and_leave_no_trace(self, make_engine: MakeEngine, peer_of: PeerOf) -> None:
        engine = make_engine(kv_bytes=8 * 8192)
        original = engine._runner.forward

        def forward(rows: Any, is_sampled: Any) -> Any:
            logits, places = original(rows, is_sampled)
            engine._storage.pages.fill_(torch.nan)  # what such a model leaves in its blocks
            return torch.full_like(logits, torch.nan), places

        engine._runner.forward = forward  # type: ignore[method-assign]
        engine.submit(submit("bad", prompt_of(100)))
        answers = run_all(engine)
        assert answers.reason("bad") is FinishReason.ERROR
        assert engine.core.pool.journal.held() == set()
        engine._runner.forward = original  # type: ignore[method-assign]
        assert not engine._storage.pages.view(8, -1)[:7].isnan().any()
        engine._storage.zero([7])
        engine.submit(submit("good", prompt_of(100)))
        assert run_all(engine).tokens("good") == peer_of("llama").greedy(prompt_of(100), 8)


class TestSeeds:
    def test_same_seed_same_tokens_in_any_company(self, make_engine: MakeEngine) -> None:
        def sampling(seed: int) -> SamplingParams:
            return SamplingParams(seed=seed, temperature=1.3, top_p=0.95, presence_penalty=0.3)

        engine = make_engine()
        engine.submit(submit("alone", prompt_of(33), 20, sampling=sampling(5)))
        alone = run_all(engine).tokens("alone")
        for name, length, seed in (("x", 9, 1), ("again", 33, 5), ("other", 33, 6)):
            engine.submit(submit(name, prompt_of(length), 20, sampling=sampling(seed)))
        together = run_all(engine)
        assert together.tokens("again") == alone
        assert together.tokens("other") != alone
        engine.submit(submit("moved", prompt_of(33), 20, emitted=alone[:7], sampling=sampling(5)))
        assert run_all(engine).tokens("moved") == alone[7:]


class TestReports:
    def test_events_say_what_is_cached(self, make_engine: MakeEngine) -> None:
        engine = make_engine(kv_bytes=10 * 8192)
        listener: set[int] = set()
        for seed in range(6):
            prompt = prompt_of(50, seed)
            engine.submit(submit(f"r{seed}", prompt, 16, cache_salt="tenant"))
            while (report := engine.step()) is not None:
                for event in report.events:
                    if isinstance(event, BlocksStored):
                        listener |= set(event.sequence_hashes)
                    elif isinstance(event, BlocksRemoved):
                        listener -= set(event.sequence_hashes)
                assert listener == engine.core.pool.journal.held()
            assert set(sequence_hashes(prompt, 16, "tenant")) <= listener
        assert len(listener) <= 10

    def test_the_first_output_brings_the_stats(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        engine.submit(submit("a", prompt_of(50), 4))
        run_all(engine)
        engine.submit(submit("b", prompt_of(50), 4))
        answers = run_all(engine)
        assert answers.stats("b").cached_token_count == 48
        assert answers.outputs["b"][0].stats is not None
        load = engine.load()
        assert (load.prompt_tokens_total, load.cached_prompt_tokens_total) == (100, 48)
        assert (load.generated_tokens_total, load.finished_total) == (8, 2)

    def test_load_while_it_works(self, make_engine: MakeEngine) -> None:
        engine = make_engine(max_running=1, max_batch_tokens=16)
        engine.submit(submit("a", prompt_of(40), 4))
        engine.submit(submit("b", prompt_of(30), 4))
        assert engine.load().waiting_prefill_tokens == 70
        engine.step()
        load = engine.load()
        assert (load.step, load.running_count, load.waiting_count) == (1, 1, 1)
        assert load.waiting_prefill_tokens == 24 + 30
        assert load.used_block_count == 3
        run_all(engine)
        assert_nothing_held(engine)

    def test_nothing_to_do_is_nothing_to_say(self, make_engine: MakeEngine) -> None:
        assert make_engine().step() is None


class TestRun:
    """The asynchronous loop."""

    async def test_requests_come_and_go_while_it_runs(self, make_engine: MakeEngine, peer_of: PeerOf) -> None:
        engine = make_engine(max_batch_tokens=64)
        answers, seen = Answers(), asyncio.Event()

        def on_step(report: StepReport) -> None:
            answers.add(report)
            seen.set()

        async def until(condition: Callable[[], bool]) -> None:
            while not condition():
                seen.clear()
                await seen.wait()

        def has_ended(name: str) -> bool:
            return name in answers.outputs and answers.outputs[name][-1].finish_reason is not None

        running = asyncio.create_task(engine.run(on_step))
        engine.submit(submit("long", prompt_of(100), 2000))
        await until(lambda: len(answers.tokens("long")) >= 3)
        engine.submit(submit("short", prompt_of(17), 5))
        await until(lambda: has_ended("short"))
        engine.abort("long")
        await until(lambda: has_ended("long"))
        assert answers.reason("long") is FinishReason.CANCELLED
        steps = engine.load().step
        await asyncio.sleep(0.05)
        assert engine.load().step == steps  # idle means idle
        engine.submit(submit("later", prompt_of(16), 5))
        await until(lambda: has_ended("later"))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert answers.tokens("short") == peer_of("llama").greedy(prompt_of(17), 5)
        assert answers.tokens("later") == peer_of("llama").greedy(prompt_of(16), 5)
        assert_nothing_held(engine)

    async def test_cancelled_in_the_middle_of_a_step_it_loses_nothing(self, make_engine: MakeEngine, peer_of: PeerOf) -> None:
        engine = make_engine(max_batch_tokens=32)
        answers = Answers()
        engine.submit(submit("a", prompt_of(100), 12))
        for _ in range(6):
            running = asyncio.create_task(engine.run(answers.add))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
        run_all(engine, answers)
        assert answers.tokens("a") == peer_of("llama").greedy(prompt_of(100), 12)
        assert_nothing_held(engine)


def test_the_card_tells_all(make_engine: MakeEngine) -> None:
    card = make_engine(name="tiny", max_batch_tokens=99, max_running=3).card
    assert (card.name, card.vocab_size, card.context_length) == ("tiny", VOCAB_SIZE, CONTEXT_LENGTH)
    assert (card.block_size, card.block_bytes, card.block_count) == (16, 2 * 2 * 16 * 2 * 16 * 4, 1024)
    assert (card.max_batch_tokens, card.max_running, card.can_hand_over) == (99, 3, True)
    assert b'"ByteLevel"' in card.tokenizer_json
    assert card.chat_template is None
