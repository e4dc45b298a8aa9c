"""The mock engine in virtual time: its tokens, its cache, its step times, and that it is made of the torch engine's own parts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from polyphase.advisor.catalog import shipped_calibration
from polyphase.advisor.step import step_times
from polyphase.core.clock import ManualClock
from polyphase.core.errors import ConfigurationError, ModelLoadError
from polyphase.core.ids import ContentKey, SequenceHash
from polyphase.engines.batching.exports import OfferOrigin
from polyphase.engines.batching.scheduler import Row
from polyphase.engines.mock import MockSettings
from polyphase.engines.mock.assembly import assemble_mock
from polyphase.engines.mock.imagined import imagine
from polyphase.engines.mock.machine import MockMachine, say_nothing
from polyphase.engines.mock.timing import imagined_times
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


def test_step_times_are_the_advisors(clock: ManualClock) -> None:
    eight_b = imagine("llama-3.1-8b", "h100")
    engine = machine(clock)
    engine.core.submit(submit("a", PROMPT * 8), None)
    step = engine.begin_step()
    assert step is not None
    rows = step.plan.rows
    times = imagined_times(eight_b)
    asked = step_times(shipped_calibration(), eight_b.setting, eight_b.mapping)
    count = rows[0].count
    assert times.step_ns(rows) == pytest.approx(asked.step_ms(0, 0, count, count * (count + 1) / 2) * 1e6, abs=1)
    assert imagined_times(eight_b, 10).step_ns(rows) == pytest.approx(times.step_ns(rows) / 10, rel=1e-3)
    assert imagined_times(eight_b, float("inf")).step_ns(rows) == 0
    assert imagined_times(imagine("llama-3.1-8b", "4xh100")).step_ns(rows) < times.step_ns(rows)
    assert imagined_times(imagine("llama-3.1-70b", "4xh100")).step_ns(rows) > times.step_ns(rows)
    decode = [Row(rows[0].sequence, 1000, 1)]
    assert 5e6 < times.step_ns(decode) < 10e6, "weights once: 16 GB at 3.35 TB/s, and some overhead"
    assert times.step_ns(decode * 64) > times.step_ns(decode)
    one_by_one = [times.step_ns([Row(rows[0].sequence, 1000 + number, 1)] * 3) for number in range(4)]
    assert times.decode_steps_ns(3, 3 * 1001, 4) == pytest.approx(one_by_one, abs=1)


def test_figures_instead_of_names() -> None:
    named, figures = imagine("llama-3.1-8b", "h100"), imagine("parameters=8.03e9,layers=32,kv-heads=8,head-dim=128", "2xh100")
    assert figures.weight_bytes == pytest.approx(named.weight_bytes, rel=1e-3)
    assert figures.kv_bytes_per_token == named.kv_bytes_per_token == 128 * 1024
    assert figures.memory_bytes == 2 * named.memory_bytes == 160e9
    assert imagine("llama-3.1-8b", "tflops=989,gb-per-s=3350,memory-gb=80").memory_bytes == named.memory_bytes


def test_mixtures_and_latent_attention() -> None:
    spread = imagine("deepseek-v3", "8xh200")
    assert spread.kv_bytes_per_token == 8 * 61 * (512 + 64), "every accelerator holds the whole latent cache, in 8 bits"
    assert 650e9 < spread.weight_bytes < 700e9
    times = imagined_times(spread)
    assert times.decode_steps_ns(64, 64_000, 1)[0] > 1.5 * times.decode_steps_ns(1, 1000, 1)[0], "more rows touch more experts"


@pytest.mark.parametrize("text", ["h101", "0xh100", "tflops=1", "tflops=x,gb-per-s=1,memory-gb=1", "tflops=-1,gb-per-s=1,memory-gb=1", ""])
def test_accelerators_that_do_not_exist(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"accelerator"):
        imagine("llama-3.1-8b", text)


def test_models_that_cannot_be() -> None:
    for text in ("parameters=8e9", "parameters=1e6,layers=32,kv-heads=8,head-dim=128"):
        with pytest.raises(ConfigurationError, match="mock model"):
            imagine(text, "h100")
    with pytest.raises(ConfigurationError, match="3 accelerators cannot share the 32 heads"):
        imagine("llama-3.1-8b", "3xh100")


def test_what_does_not_fit_is_refused(tmp_path: object) -> None:
    with pytest.raises(ConfigurationError, match="leaves no room for KV on h100; take more of them, for example 4xh100"):
        assemble_mock(MockSettings(MODEL, shape="llama-3.1-70b"), is_shared=False)
    with pytest.raises(ModelLoadError, match=r"has no tokenizer\.json"):
        assemble_mock(MockSettings(str(tmp_path)), is_shared=False)
    with pytest.raises(ConfigurationError, match=r"model '?gpt"):
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
        "print(*[m for m in ('torch', 'transformers') if m in sys.modules])"
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
