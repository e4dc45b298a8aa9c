"""The mock engine in virtual time: its tokens, its cache, its step times, and that it is made of the torch engine's own parts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from polyphase.core.clock import ManualClock
from polyphase.core.errors import ConfigurationError, ModelLoadError
from polyphase.core.ids import ContentKey, SequenceHash
from polyphase.engines.batching.exports import OfferOrigin
from polyphase.engines.batching.scheduler import Row
from polyphase.engines.mock import MockSettings, parse_accelerator, parse_model_shape
from polyphase.engines.mock.assembly import assemble_mock
from polyphase.engines.mock.machine import MockMachine, say_nothing
from polyphase.engines.mock.timing import StepTimes
from polyphase.engines.mock.tokens import answer_length
from polyphase.kv import GivenNames
from polyphase.transfer import Agent, PeerBlocks
from polyphase.wire.requests import FinishReason, StopConditions
from tests.unit.mock.building import MODEL, ask, machine, run, settings, submit

PROMPT = list(range(100, 150))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def test_tokens_follow_from_prompt_and_position(clock: ManualClock) -> None:
    first, second = machine(clock), machine(clock, max_batch_tokens=16)
    tokens = ask(first, clock, submit("a", PROMPT))
    assert tokens == ask(second, clock, submit("b", PROMPT)), "another batch size, the same tokens"
    assert tokens == assemble_mock(settings(), is_shared=False).tokens.answer(PROMPT, 8, 16)
    assert tokens != ask(first, clock, submit("c", PROMPT[1:]))
    assert len(set(tokens)) > 4


def test_a_migrated_request_goes_on_with_the_same_tokens(clock: ManualClock) -> None:
    tokens = ask(machine(clock), clock, submit("a", PROMPT, 20))
    assert tokens[:7] + ask(machine(clock), clock, submit("a", PROMPT, 20, emitted=tokens[:7])) == tokens


def test_a_second_turn_finds_the_first_in_the_cache(clock: ManualClock) -> None:
    engine = machine(clock)
    answer = ask(engine, clock, submit("a", PROMPT, 30))
    engine.core.submit(submit("b", PROMPT + answer + [7] * 10), None)
    stats = [output.stats for output in run(engine, clock) if output.stats]
    assert [one.cached_token_count for one in stats] == [64], "79 tokens are computed: four whole blocks"
    engine.core.pool.check_invariants()
    assert engine.core.pool.used_count == 0


def test_answers_end_by_themselves(clock: ManualClock) -> None:
    engine = machine(clock, kv_bytes=256 << 20)
    engine.core.submit(submit("a", PROMPT, stop=StopConditions(max_tokens=1000)), None)
    outputs = run(engine, clock)
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert 16 <= len(outputs) - 1 < 400
    engine.core.submit(submit("b", PROMPT, stop=StopConditions(max_tokens=1000, min_tokens=500)), None)
    assert len(run(engine, clock)) == 501, "the end of sequence is held back until then"
    assert answer_length(0) == 16


def test_a_long_prompt_takes_its_time_and_a_cached_one_does_not(clock: ManualClock) -> None:
    engine = machine(clock, kv_bytes=8 << 30)
    durations = []
    for name in "ab":
        began_ns = clock.now_ns()
        ask(engine, clock, submit(name, [1, 2, 3, 4] * 8000, max_tokens=1))
        durations.append((clock.now_ns() - began_ns) / 1e9)
    assert 0.7 < durations[0] < 2, "32,000 tokens of an 8 B model on an H100"
    assert durations[1] < 0.05 * durations[0]


def test_step_times_scale(clock: ManualClock) -> None:
    shape, accelerator = parse_model_shape("llama-3.1-8b"), parse_accelerator("h100")
    engine = machine(clock)
    engine.core.submit(submit("a", PROMPT * 8), None)
    step = engine.begin_step()
    assert step is not None
    rows = step.plan.rows
    whole = StepTimes(shape, accelerator).step_ns(rows)
    assert StepTimes(shape, accelerator, 10).step_ns(rows) == pytest.approx(whole / 10, rel=1e-3)
    assert StepTimes(shape, accelerator, float("inf")).step_ns(rows) == 0
    assert StepTimes(shape, parse_accelerator("4xh100")).step_ns(rows) < whole
    assert StepTimes(parse_model_shape("llama-3.1-70b"), parse_accelerator("4xh100")).step_ns(rows) > whole
    sequence = rows[0].sequence
    decode = [Row(sequence, 1000, 1)]
    assert 6e6 < StepTimes(shape, accelerator).step_ns(decode) < 10e6, "weights once: 16 GB at 3.35 TB/s, and some overhead"
    assert StepTimes(shape, accelerator).step_ns(decode * 64) > StepTimes(shape, accelerator).step_ns(decode)


def test_figures_instead_of_names() -> None:
    shape = parse_model_shape("parameters=8.03e9,layers=32,kv-heads=8,head-dim=128")
    assert shape == parse_model_shape("llama-3.1-8b")
    assert shape.kv_bytes_per_token == 128 * 1024
    assert parse_accelerator("tflops=989,gb-per-s=3350,memory-gb=80") == parse_accelerator("h100")
    assert parse_accelerator("2xh100").memory_bytes == 160e9


@pytest.mark.parametrize("text", ["h101", "0xh100", "tflops=1", "tflops=x,gb-per-s=1,memory-gb=1", "tflops=-1,gb-per-s=1,memory-gb=1", ""])
def test_accelerators_that_do_not_exist(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"there is no mock accelerator .* name one of a100, h100"):
        parse_accelerator(text)


def test_what_does_not_fit_is_refused(tmp_path: object) -> None:
    with pytest.raises(ConfigurationError, match="leaves no room for KV on h100; take more of them, for example 4xh100"):
        assemble_mock(MockSettings(MODEL, shape="llama-3.1-70b"), is_shared=False)
    with pytest.raises(ModelLoadError, match=r"has no tokenizer\.json"):
        assemble_mock(MockSettings(str(tmp_path)), is_shared=False)
    with pytest.raises(ConfigurationError, match="there is no mock model 'gpt'"):
        assemble_mock(MockSettings(MODEL, shape="gpt"), is_shared=False)


def test_blocks_are_handed_over(clock: ManualClock) -> None:
    prefill, decode = machine(clock, is_shared=True), machine(clock, is_shared=True)
    shared = prefill.storage.shared
    assert shared is not None
    lender, reader = Agent("p"), Agent("d")
    region = lender.register(shared, prefill.storage.layout)
    card = lender.card_with(region.card)
    prefill.core.exports.origin = OfferOrigin("p", 1, "ipc://nowhere", card, region.region_id)
    prefill.core.submit(submit("a", PROMPT, hand_over=True), None)
    (handed,) = run(prefill, clock)
    assert handed.finish_reason is FinishReason.HANDED_OVER
    assert handed.offer is not None
    source = PeerBlocks(reader.connect(card), region.card)
    decode.core.submit(submit("a", PROMPT, emitted=handed.token_ids, offer=handed.offer), source)
    outputs = run(decode, clock)
    stats = outputs[0].stats
    assert stats is not None
    assert (stats.transferred_token_count, stats.transferred_bytes) == (50, 4 * 16 * 128 * 1024)
    assert stats.transfer_ms > 0
    tokens = handed.token_ids + [token for output in outputs for token in output.token_ids]
    assert tokens == ask(machine(clock), clock, submit("whole", PROMPT))
    reader.close()
    lender.close()
    prefill.storage.close()
    decode.storage.close()


def test_a_worker_with_a_mock_engine_loads_no_model_code() -> None:
    script = (
        "import sys, polyphase.worker.__main__; from polyphase.engines.mock import MockSettings;"
        "from polyphase.engines.mock.engine import load_mock_engine; load_mock_engine(MockSettings(sys.argv[1])).close();"
        "print(*[m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", script, MODEL], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


def imagined(engine: MockMachine, name: str, prompt_count: int, max_tokens: int) -> None:
    """A request without tokens, whose blocks nobody else has."""
    count = prompt_count + max_tokens
    hashes = [SequenceHash(hash((name, place)) % 2**64) for place in range(count // engine.card.block_size)]
    request = submit(name, [0] * prompt_count, max_tokens)
    engine.core.submit_imagined(request, GivenNames([ContentKey(one.to_bytes(32)) for one in hashes], hashes))


def test_a_stretch_ends_where_something_happens(clock: ManualClock) -> None:
    engine = MockMachine(assemble_mock(settings(), is_shared=False), clock, say_nothing)
    imagined(engine, "a", 20, 40)
    first = engine.begin_stretch(0, 1000)
    assert first is not None
    assert len(first.ends_ns) == 1, "the prompt"
    assert engine.finish_stretch(first).outputs[0].stats is not None
    lengths = []
    while (stretch := engine.begin_stretch(first.ends_ns[-1], 1000)) is not None:
        lengths.append(len(stretch.ends_ns))
        outputs = engine.finish_stretch(stretch).outputs
    assert lengths == [12, 16, 11], "the blocks are full with 32 and 48 tokens; the last of 60 tokens ends the answer"
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert (engine.core.load().generated_tokens_total, engine.core.load().step) == (40, 40)


def test_a_coasting_sequence_can_be_aborted(clock: ManualClock) -> None:
    engine = MockMachine(assemble_mock(settings(), is_shared=False), clock, say_nothing)
    for name in "ab":
        imagined(engine, name, 20, 60)
    first = engine.begin_stretch(0, 1000)
    assert first is not None
    engine.finish_stretch(first)
    stretch = engine.begin_stretch(first.ends_ns[-1], 1000)
    assert stretch is not None
    assert len(stretch.ends_ns) == 12
    engine.cut(stretch, stretch.ends_ns[4] + 1)
    assert len(stretch.ends_ns) == 6, "five steps are over, and one is under way"
    engine.core.abort("a")
    engine.core.abort("a")
    report = engine.finish_stretch(stretch)
    assert [(one.request_id, one.finish_reason) for one in report.outputs] == [("a", FinishReason.CANCELLED)]
    assert engine.core.load().running_count == 1
    while (stretch := engine.begin_stretch(0, 1000)) is not None:
        report = engine.finish_stretch(stretch)
    assert [(one.request_id, one.finish_reason) for one in report.outputs] == [("b", FinishReason.LENGTH)]
    engine.core.pool.check_invariants()
    assert engine.core.pool.used_count == 0
