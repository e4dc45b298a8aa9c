from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyphase.advisor.calibration import uncalibrated
from polyphase.advisor.catalog import shipped_calibration
from polyphase.advisor.deployment import Serving, Traffic
from polyphase.advisor.estimate import Question, estimate
from polyphase.advisor.mapping import ParallelMapping
from polyphase.advisor.step import step_times

from .building import setting

CASES = [
    ("llama-3.1-70b", ParallelMapping(4)),
    ("qwen3-32b", ParallelMapping(8)),
    ("gpt-oss-120b", ParallelMapping(2, 1, 1, 2, 1)),
    ("deepseek-v3", ParallelMapping(8, 1, 1, 8, 1)),
    ("deepseek-v3", ParallelMapping(1, 1, 16, 1, 16)),
]


@pytest.mark.parametrize(("model", "mapping"), CASES)
@pytest.mark.parametrize("rows", [1, 8, 32, 128])
def test_steps_of_a_split_deployment_take_its_itl(model: str, mapping: ParallelMapping, rows: int) -> None:
    """Where nothing is prefilled beside it, ITL is the step's time. Experts are touched by chance, and the fullest rank is a little
    ahead.
    """
    s = setting(model, serving=Serving.DISAGGREGATED)
    question = Question(s, mapping, rows * mapping.dp, Traffic(3584, 1024), prefill_mapping=mapping, prefill_worker_count=1)
    expected = estimate(uncalibrated(), question).itl_ms.value
    assert step_times(uncalibrated(), s, mapping).step_ms(rows, rows * 4096) == pytest.approx(expected, rel=0.16)


@given(st.sampled_from(CASES), st.integers(0, 256), st.integers(0, 8192), st.integers(0, 8192))
def test_more_work_never_takes_less_time(case: tuple[str, ParallelMapping], rows: int, context: int, prompt: int) -> None:
    for calibration in (uncalibrated(), shipped_calibration()):
        times = step_times(calibration, setting(case[0]), case[1])
        base = times.step_ms(rows, rows * context, prompt, prompt * prompt / 2)
        assert base > 0
        assert times.step_ms(rows + 1, (rows + 1) * context, prompt, prompt * prompt / 2) >= base
        assert times.step_ms(rows, rows * context, prompt + 1, (prompt + 1) ** 2 / 2) >= base


def test_a_chunk_of_a_prompt_is_bound_by_arithmetic() -> None:
    """8,192 tokens of Llama-70B in fp8 over four H200: not faster than their peak, and at least a third of it."""
    s = setting("llama-3.1-70b")
    chunk_ms = step_times(shipped_calibration(), s, ParallelMapping(4)).step_ms(0, 0, 8192, 8192**2 / 2)
    peak_ms = 2 * 69.5e9 * 8192 / (4 * 1978e12) * 1e3
    assert peak_ms < chunk_ms < 4 * peak_ms
