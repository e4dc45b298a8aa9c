from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from polyphase.advisor.calibrate import KERNEL, calibrate, cross_validated, held_out_folds
from polyphase.advisor.calibration import Basis, from_json, to_json
from polyphase.advisor.catalog import shipped_calibration
from polyphase.advisor.deployment import Traffic
from polyphase.advisor.efficiency import ITL_PRIORS, fit_efficiency
from polyphase.advisor.estimate import Question, estimate
from polyphase.advisor.evaluation import Prediction, errors, errors_by_group, predict, quantile_scale
from polyphase.advisor.mapping import ParallelMapping
from polyphase.advisor.measurements import read_measurements, throughput
from polyphase.advisor.residual import Points, choose_support, fit_residual, kernel
from polyphase.core.errors import ConfigurationError

from .building import LIBRARY, disaggregated_row, row, setting, synthetic_table

MEASUREMENTS = read_measurements(synthetic_table(), LIBRARY).measurements


def test_rows_are_read_as_the_formulas_say() -> None:
    whole, apart = read_measurements([row(), disaggregated_row(decode_attention_dp_size=2)], LIBRARY).measurements
    assert (whole.gpu_count, whole.concurrency, whole.batch) == (4, 8, 8)
    assert whole.out_tok_s_per_gpu == pytest.approx(8 * 1024 / ((200 + 12 * 1023) / 1000) / 4)
    assert apart.gpu_count == 3 * 2 + 2 * 4 * 2
    assert apart.concurrency == 16 * 2 * 2
    assert apart.batch == 16
    assert apart.waiting == pytest.approx(64 / 3)
    named = read_measurements([row(silicon_data_source="silicon_concurrency=12; InferenceX")], LIBRARY).measurements[0]
    assert named.concurrency == 12


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"silicon_tpot_ms": ""}, "silicon_tpot_ms is blank or 0"),
        ({"silicon_ttft_ms": "soon"}, "silicon_ttft_ms is no number"),
        ({"silicon_ttft_ms": 20_000}, "overloaded: TTFT over 10 s"),
        ({"model_path": "acme/mystery-7b"}, "unknown model acme/mystery-7b"),
        ({"system": "tpu9"}, "unknown accelerator tpu9"),
        ({"mode": "both"}, "mode 'both' is neither agg nor disagg"),
        ({"gemm_quant_mode": "fp7"}, "unknown precision fp7"),
        ({"tp_size": "nan"}, "tp_size is out of range"),
    ],
)
def test_what_cannot_be_used_is_counted_with_its_reason(changes: dict[str, object], reason: str) -> None:
    table = read_measurements([row(), row(**changes)], LIBRARY)
    assert len(table.measurements) == 1
    assert dict(table.skipped) == {reason: 1}


def test_disaggregated_rows_need_their_worker_counts() -> None:
    assert dict(read_measurements([disaggregated_row(decode_num_workers="")], LIBRARY).skipped) == {
        "disaggregated without worker counts": 1
    }


def test_a_table_without_the_columns_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="lacks the columns backend, model_path"):
        read_measurements([{"a": "1"}], LIBRARY)


@pytest.mark.parametrize(
    ("reported", "as_run"),
    [
        ((64, 1, 8, 8), ParallelMapping(8, 1, 1, 1, 8)),  # TP 8, EP 8 on eight
        ((1, 16, 4, 4), ParallelMapping(1, 1, 4, 1, 4)),  # the same with data parallel attention
        ((4, 4, 1, 16), ParallelMapping(1, 1, 4, 1, 4)),
        ((8, 1, 1, 8), ParallelMapping(8, 1, 1, 1, 8)),
        ((72, 1, 72, 1), ParallelMapping(1, 1, 72, 1, 72)),
    ],
)
@pytest.mark.parametrize(
    "source",
    [
        "silicon_concurrency=64; InferenceX",
        "db-dump/2026-04-27; config_id=7; silicon_concurrency=64",
        "source_file=2026-04-06.csv; silicon_concurrency=64",
    ],
)
def test_inferencex_rows_are_read_as_they_were_run(source: str, reported: tuple[int, ...], as_run: ParallelMapping) -> None:
    sizes = dict(zip(("tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size"), reported, strict=True))
    read = read_measurements([row(model_path="deepseek-ai/DeepSeek-R1", silicon_data_source=source, **sizes)], LIBRARY).measurements[0]
    assert read.mapping == as_run
    assert read.is_doubtful == (as_run.gpu_count > 8)
    assert read.gpu_count == reported[0] * reported[1]  # as the throughput formula counts


def test_more_requests_than_an_engine_holds_are_shared_by_several() -> None:
    read = read_measurements([row(silicon_data_source="silicon_concurrency=416", batch_size="13", tp_size="2")], LIBRARY).measurements[0]
    assert (read.worker_count, read.batch, read.concurrency, read.gpu_count) == (32, 13, 416, 64)
    odd = read_measurements([row(silicon_data_source="silicon_concurrency=20", batch_size="13", tp_size="2")], LIBRARY).measurements[0]
    assert (odd.worker_count, odd.batch) == (1, 20)


def test_a_fit_finds_the_weights_of_a_known_law() -> None:
    rng = np.random.default_rng(1)
    terms = np.abs(rng.normal(1, 0.5, (600, len(ITL_PRIORS))))
    truth = np.array([weight for weight, _ in ITL_PRIORS.values()]) * np.exp(rng.normal(0, 0.3, len(ITL_PRIORS)))
    log_times = np.log(terms @ truth) + rng.normal(0, 0.01, 600)
    log_times[::50] += 1.5  # measurements of something else
    fitted = fit_efficiency(ITL_PRIORS, terms, log_times, [("vllm", "hopper")] * 600)
    times = terms @ fitted.weights(("vllm", "hopper"))
    assert np.median(np.abs(np.log(times) - np.log(terms @ truth))) < 0.01


def test_without_information_weights_stay_at_their_priors() -> None:
    terms = np.zeros((30, len(ITL_PRIORS)))
    terms[:, 0] = 1.0
    fitted = fit_efficiency(ITL_PRIORS, terms, np.full(30, np.log(1.3)), [("vllm", "hopper")] * 30)
    np.testing.assert_allclose(np.exp(fitted.log_weights), [weight for weight, _ in ITL_PRIORS.values()], rtol=1e-6)
    assert fitted.weights(("unheard of",)) == pytest.approx(np.exp(fitted.log_weights))


def test_the_residual_is_near_where_measured_and_zero_far_away() -> None:
    rng = np.random.default_rng(2)
    quantities = rng.uniform(0, 6, (200, 6))
    points = Points(np.zeros((200, 7), dtype=np.int64), quantities)
    values = 0.2 * np.sin(quantities[:, 0])
    support = points.take(choose_support(KERNEL, points, 150))
    residual = fit_residual(KERNEL, 0.02, points, values, support)
    near = residual.grid_mean(np.zeros(7, dtype=np.int64), quantities[:1, 1:], quantities[:1, 0])[0, 0]
    assert near == pytest.approx(values[0], abs=0.05)
    elsewhere = np.full(7, -1)
    assert abs(residual.grid_mean(elsewhere, quantities[:1, 1:] + 40, quantities[:1, 0] + 40)[0, 0]) < 1e-6
    assert residual.deviation(elsewhere, quantities[:1] + 40)[0] > 3 * residual.deviation(np.zeros(7, dtype=np.int64), quantities[:1])[0]


def test_the_kernel_is_one() -> None:
    rng = np.random.default_rng(4)
    points = Points(rng.integers(0, 3, (60, 7)), rng.normal(0, 3, (60, 6)))
    matrix = kernel(KERNEL, points, points)
    np.testing.assert_allclose(matrix, matrix.T)
    assert np.linalg.eigvalsh(matrix).min() > -1e-9


def test_folds_keep_configurations_and_repeated_measurements_together() -> None:
    keys = ["a", "a", "b", "c", "d", "e"]
    identities = [1, 2, 3, 3, 4, 5]  # b and c hold the same measurement
    folds = held_out_folds(keys, identities, 3)
    assert folds[0] == folds[1]
    assert folds[2] == folds[3]
    assert len(set(folds)) == 3
    assert folds == held_out_folds(keys, identities, 3)


def test_a_synthetic_law_is_learned_and_cross_validated() -> None:
    calibration, found = cross_validated(MEASUREMENTS)
    figures = found.figures()
    assert figures["configuration"]["itl_median_pct"] < 6
    assert figures["configuration"]["ttft_median_pct"] < 20
    assert 60 <= figures["configuration"]["interval80_coverage_pct"] <= 95
    assert errors(predict(calibration, MEASUREMENTS))["itl_median_pct"] < 4
    assert set(calibration.interval_scale) == {f"{q}/{b.name}" for q in ("itl", "ttft", "tput") for b in Basis}


def test_too_few_measurements_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="3 usable measurements are too few"):
        calibrate(MEASUREMENTS[:3])


def test_a_calibration_survives_its_file() -> None:
    fitted = replace(calibrate(MEASUREMENTS, support_count=40), interval_scale={"itl/PAIR": 1.25}, provenance={"table": "t.csv"})
    again = from_json(to_json(fitted), "file")
    for one, two in zip(predict(fitted, MEASUREMENTS), predict(again, MEASUREMENTS), strict=True):
        assert one.itl_error == pytest.approx(two.itl_error, abs=2e-3)
        assert one.ttft_deviation == pytest.approx(two.ttft_deviation, rel=1e-2)
        assert one.basis == two.basis
    assert again.provenance == {"table": "t.csv"}
    assert again.scale("itl", Basis.PAIR) == 1.25


@pytest.mark.parametrize("text", ["{}", "nonsense", '{"format": "polyphase-calibration-1"}'])
def test_what_is_no_calibration_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="file is no calibration"):
        from_json(text, "file")
    with pytest.raises(ConfigurationError, match="Calibrate anew"):
        from_json('{"format": "polyphase-calibration-0"}', "file")


def test_the_shipped_calibration_knows_what_it_rests_on() -> None:
    shipped = shipped_calibration()
    assert shipped.provenance["table_licence"].startswith("Apache-2.0")
    assert shipped.provenance["held_out_errors"]["configuration"]["itl_median_pct"] <= 10
    assert shipped.basis(setting("llama-3.1-70b", "h200")) is Basis.PAIR
    assert shipped.basis(setting("mixtral-8x22b", "h200")) is Basis.NEAR
    assert shipped.basis(setting("llama-3.1-70b", "mi300x")) is Basis.ROOFLINE


def test_intervals_widen_away_from_measurements() -> None:
    def width(model: str, accelerator: str) -> float:
        question = Question(setting(model, accelerator), ParallelMapping(8), 32, Traffic(1024, 1024))
        figure = estimate(shipped_calibration(), question).itl_ms
        return figure.high / figure.low

    assert width("llama-3.1-70b", "h200") < width("mistral-large-2", "h200") < width("mistral-large-2", "mi300x")


def _prediction(itl: float, ttft: float, tput: float, is_covered: tuple[bool, bool, bool]) -> Prediction:
    return Prediction(MEASUREMENTS[0], np.log(itl), np.log(ttft), np.log(tput), 0.1, 0.1, 0.1, is_covered, "pair")


def test_errors_by_hand() -> None:
    predictions = [
        _prediction(1.10, 1.5, 0.9, (True, False, True)),
        _prediction(0.80, 1.0, 1.0, (True, True, True)),
        _prediction(1.30, 0.7, 1.2, (False, True, True)),
        _prediction(1.00, 2.0, 1.1, (True, True, False)),
    ]
    figures = errors(predictions)
    assert figures["count"] == 4
    assert figures["itl_median_pct"] == pytest.approx(15.0)  # of 0, 10, 20, 30
    assert figures["itl_p90_pct"] == pytest.approx(27.0)
    assert figures["ttft_median_pct"] == pytest.approx(40.0)  # of 0, 30, 50, 100
    assert figures["tput_median_pct"] == pytest.approx(10.0)  # of 0, 10, 10, 20
    assert figures["interval80_coverage_pct"] == 75.0
    assert errors_by_group(predictions)["backend"]["vllm"] == figures
    assert quantile_scale(predictions, "itl", 1.0) == pytest.approx(np.log(1.3) / 0.12816)


def test_throughput_by_hand() -> None:
    assert throughput(10, 101, 500, 5) == pytest.approx(1010)
