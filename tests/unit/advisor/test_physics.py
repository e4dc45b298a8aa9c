"""What must hold whatever was fitted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyphase.advisor.calibration import uncalibrated
from polyphase.advisor.catalog import shipped_calibration
from polyphase.advisor.counts import DECODE_TERMS, decode_terms, kv_bytes_of_sequence
from polyphase.advisor.deployment import Serving, Speculation, Traffic
from polyphase.advisor.estimate import Question, estimate
from polyphase.advisor.mapping import Mappings, ParallelMapping, mappings_of
from polyphase.advisor.memory import batch_limit, missing_bytes, weight_bytes

from .building import LIBRARY, setting

CALIBRATIONS = [uncalibrated(), shipped_calibration()]
models = st.sampled_from(["llama-3.1-70b", "deepseek-v3", "gpt-oss-120b", "qwen3.5-397b-a17b", "glm-5"])
calibrations = st.sampled_from(CALIBRATIONS)
lengths = st.integers(64, 16_384)


def asked(model: str, mapping: ParallelMapping, concurrency: float = 64, isl: float = 2048, osl: float = 512) -> Question:
    return Question(setting(model), mapping, concurrency, Traffic(isl, osl))


@given(models, calibrations, st.integers(1, 2000), st.integers(1, 2000), lengths, lengths)
def test_a_larger_batch_never_has_shorter_steps(model: str, calibration, first: int, second: int, isl: int, osl: int) -> None:
    small, large = sorted((first, second))
    mapping = ParallelMapping(8, 1, 1, 8, 1) if LIBRARY.model(model).experts else ParallelMapping(8)
    times = [estimate(calibration, asked(model, mapping, load, isl, osl)).itl_ms.value for load in (small, large)]
    assert times[0] <= times[1] * (1 + 1e-9)


@given(models, calibrations, st.sampled_from(["memory_bytes_per_s", "link_bytes_per_s", "network_bytes_per_s"]), st.floats(1.0, 8.0))
def test_more_bandwidth_is_never_slower(model: str, calibration, field: str, factor: float) -> None:
    mapping = ParallelMapping(8, 1, 1, 8, 1) if LIBRARY.model(model).experts else ParallelMapping(8)
    question = asked(model, mapping)
    accelerator = question.setting.accelerator
    faster = replace(accelerator, **{field: getattr(accelerator, field) * factor})
    before = estimate(calibration, question)
    after = estimate(calibration, replace(question, setting=replace(question.setting, accelerator=faster)))
    assert after.itl_ms.value <= before.itl_ms.value * (1 + 1e-9)


@given(models, st.floats(1.0, 16.0))
def test_more_arithmetic_is_never_slower(model: str, factor: float) -> None:
    mapping = ParallelMapping(8, 1, 1, 8, 1) if LIBRARY.model(model).experts else ParallelMapping(8)
    question = asked(model, mapping)
    accelerator = question.setting.accelerator
    faster = replace(accelerator, flops_per_s={peak: value * factor for peak, value in accelerator.flops_per_s.items()})
    after = estimate(CALIBRATIONS[0], replace(question, setting=replace(question.setting, accelerator=faster)))
    before = estimate(CALIBRATIONS[0], question)
    assert after.itl_ms.value <= before.itl_ms.value * (1 + 1e-9)
    assert after.ttft_ms.value <= before.ttft_ms.value * (1 + 1e-9)


@given(calibrations, st.integers(64, 8000), st.integers(64, 8000))
def test_a_longer_prompt_never_comes_back_sooner(calibration, first: int, second: int) -> None:
    short, long = sorted((first, second))
    uncalibrated_times = [
        estimate(CALIBRATIONS[0], asked("llama-3.1-70b", ParallelMapping(4), isl=isl)).ttft_ms.value for isl in (short, long)
    ]
    assert uncalibrated_times[0] <= uncalibrated_times[1] * (1 + 1e-9)
    for isl in (short, long):
        figure = estimate(calibration, asked("llama-3.1-70b", ParallelMapping(4), isl=isl)).ttft_ms
        assert 0 < figure.low < figure.value < figure.high


def test_a_cached_prefix_shortens_the_ttft() -> None:
    question = asked("llama-3.1-70b", ParallelMapping(4), isl=8000)
    cached = replace(question, traffic=replace(question.traffic, cached_tokens=7000))
    for calibration in CALIBRATIONS:
        assert estimate(calibration, cached).ttft_ms.value < estimate(calibration, question).ttft_ms.value


def test_weights_alone_are_a_lower_bound_of_a_step() -> None:
    """70.6 billion parameters in fp8 over four times 4.8 TB/s."""
    floor_ms = 70.6e9 / 4 / 4.8e12 * 1e3
    assert estimate(CALIBRATIONS[0], asked("llama-3.1-70b", ParallelMapping(4), 1)).itl_ms.value > floor_ms


def test_terms_by_hand() -> None:
    """Llama-3.1-8B in 16 bits on one H200, one sequence of 1,000 tokens."""
    s = setting("llama-3.1-8b", precision="bf16")
    terms = dict(
        zip(
            DECODE_TERMS,
            decode_terms(s.shape, s.accelerator, s.precision, Mappings.of([ParallelMapping()]), np.ones(1), 1000.0)[0],
            strict=True,
        )
    )
    assert terms["weights"] == pytest.approx(2 * s.shape.dense_parameters / 4.8e12 * 1e3)
    assert terms["attention"] == pytest.approx(1000 * 32 * 2 * 8 * 128 * 2 / 4.8e12 * 1e3)
    assert terms["flops"] == pytest.approx(2 * s.shape.dense_parameters / 989e12 * 1e3)
    assert terms["layers"] == pytest.approx(32e-3)
    assert terms["reduce"] == terms["exchange"] == terms["experts"] == terms["unpack"] == 0.0


def test_few_tokens_touch_few_experts_and_many_touch_all() -> None:
    s = setting("deepseek-v3")
    mappings = Mappings.of([ParallelMapping(8, 1, 1, 8, 1)] * 2)
    place = DECODE_TERMS.index("experts")
    one, many = decode_terms(s.shape, s.accelerator, s.precision, mappings, np.array([1.0, 10_000.0]), 1000.0)[:, place]
    assert one == pytest.approx(many * 8 / 256, rel=1e-6)


def test_formats_without_arithmetic_are_unpacked() -> None:
    place = DECODE_TERMS.index("unpack")
    unpacked = []
    for accelerator in ("h200", "b200"):
        s = setting("gpt-oss-120b", accelerator, "bf16+mxfp4")
        mappings = Mappings.of([ParallelMapping(1, 1, 1, 1, 1)])
        unpacked.append(decode_terms(s.shape, s.accelerator, s.precision, mappings, np.ones(1), 1000.0)[0, place])
    assert unpacked[0] > 0
    assert unpacked[1] == 0


def test_drafting_helps_small_batches_most() -> None:
    def gain(batch: float) -> float:
        question = asked("deepseek-v3", ParallelMapping(8, 1, 1, 8, 1), batch)
        drafting = replace(question, setting=replace(question.setting, speculation=Speculation(2, 0.8)))
        return estimate(CALIBRATIONS[0], question).itl_ms.value / estimate(CALIBRATIONS[0], drafting).itl_ms.value

    assert Speculation(2, 0.8).tokens_per_step == pytest.approx(1 + 0.8 + 0.64)
    assert 1.2 < gain(256) < gain(1) < 2.44


@given(models, st.integers(1, 96))
def test_mappings_divide_what_they_divide(model: str, max_gpus: int) -> None:
    shape = LIBRARY.model(model)
    found = mappings_of(shape, max_gpus)
    assert len(found) == len(set(found))
    for m in found:
        assert m.gpu_count <= max_gpus
        assert shape.attention.query_head_count % m.tp == 0
        assert shape.layer_count % m.pp == 0
        if shape.experts:
            assert m.moe_tp * m.moe_ep == m.tp * m.dp
            assert shape.experts.expert_count % m.moe_ep == 0
            assert shape.experts.intermediate_size % m.moe_tp == 0
        else:
            assert m.dp == m.moe_tp == m.moe_ep == 1
    for m in mappings_of(shape, max_gpus, backend="vllm"):
        assert m in found
        assert m.moe_ep in (1, m.tp * m.dp), "it spreads experts over all of its accelerators or none"


@given(models, st.integers(2, 72))
def test_spreading_a_model_never_takes_more_room(model: str, max_gpus: int) -> None:
    s = setting(model)
    found = mappings_of(s.shape, max_gpus)
    held = weight_bytes(s.shape, s.precision, Mappings.of(found))
    whole = weight_bytes(s.shape, s.precision, Mappings.of([ParallelMapping()]))[0]
    assert (held <= whole * (1 + 1e-9)).all()
    tables = 2.0 * (s.shape.output_parameters + s.shape.embedding_parameters)
    rest = (s.shape.parameter_count - s.shape.output_parameters - s.shape.embedding_parameters) * s.precision.gemm.bytes_per_weight
    assert whole == pytest.approx(tables + rest, rel=1e-3)


def test_memory_limits_and_what_is_missing_agree() -> None:
    s = setting("deepseek-v3", "h100", "fp8")
    for mapping in (ParallelMapping(8, 1, 1, 8, 1), ParallelMapping(8, 1, 2, 1, 16)):
        limit = batch_limit(s.shape, s.accelerator, s.precision, Mappings.of([mapping]), 4096)[0]
        lacks = missing_bytes(s.shape, s.accelerator, s.precision, mapping, 4096)
        assert (limit >= 1) == (lacks <= 0)


def test_windowed_layers_hold_only_their_window() -> None:
    s = setting("gpt-oss-120b", precision="bf16+mxfp4")
    per_token = 2 * 8 * 64 * s.precision.kv_bytes
    assert float(kv_bytes_of_sequence(s.shape, s.precision, 10_000)) == pytest.approx(18 * (10_000 + 128) * per_token)


def test_golden_estimates() -> None:
    """Of the coefficients that are shipped; whoever calibrates anew looks at these and moves them."""
    figures = {
        "llama": estimate(CALIBRATIONS[1], asked("llama-3.1-70b", ParallelMapping(8), 32, 1024, 1024)),
        "deepseek": estimate(
            CALIBRATIONS[1], Question(setting("deepseek-v3", backend="sglang"), ParallelMapping(8, 1, 1, 8, 1), 64, Traffic(1024, 1024))
        ),
    }
    assert figures["llama"].itl_ms.value == pytest.approx(10.75, rel=0.1)  # 11.0 measured
    assert figures["deepseek"].itl_ms.value == pytest.approx(29.0, rel=0.1)
    assert figures["deepseek"].ttft_ms.value == pytest.approx(531, rel=0.2)


def test_disaggregated_steps_are_not_disturbed_by_prefill() -> None:
    whole = estimate(CALIBRATIONS[0], asked("llama-3.1-70b", ParallelMapping(4), 64, 8000, 200))
    apart = Question(
        setting("llama-3.1-70b", serving=Serving.DISAGGREGATED),
        ParallelMapping(4),
        64,
        Traffic(8000, 200),
        prefill_mapping=ParallelMapping(4),
        prefill_worker_count=4,
    )
    assert estimate(CALIBRATIONS[0], apart).itl_ms.value < whole.itl_ms.value / 2


def test_no_more_comes_through_than_prefill_workers_can_do() -> None:
    apart = Question(
        setting("llama-3.1-70b", serving=Serving.DISAGGREGATED),
        ParallelMapping(8),
        1,
        Traffic(8000, 50),
        prefill_mapping=ParallelMapping(2),
        prefill_worker_count=1,
    )
    rates = [estimate(CALIBRATIONS[0], replace(apart, concurrency=load)).tok_s.value / 50 for load in (64, 256, 1024)]
    flops = 2 * 69.5e9 * 8000
    assert rates[-1] < 2 * 1978e12 / flops  # two accelerators at their peak
    assert rates[-1] == pytest.approx(rates[-2], rel=0.05)
