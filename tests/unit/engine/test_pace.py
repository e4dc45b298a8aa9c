"""Steps are as large as fits into their time, whatever the machine; and the torch engine keeps to it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyphase.core.clock import ManualClock
from polyphase.engines.batching.pace import FIRST_TOKENS, LEAST_TOKENS, StepPace
from polyphase.engines.torch.assembly import assemble
from polyphase.engines.torch.settings import TorchSettings
from tests.unit.engine.conftest import ModelFolder
from tests.unit.engine.tiny import prompt_of, submit

MS = 1_000_000


def run(pace: StepPace, ns_per_token: int, steps: int = 12) -> list[int]:
    """Full steps on a machine of this speed; the limits that held for them."""
    limits = []
    for _ in range(steps):
        limits.append(pace.limit_tokens)
        pace.note(pace.limit_tokens, pace.limit_tokens * ns_per_token)
    return limits


def test_a_fast_machine_gets_to_the_largest_step() -> None:
    assert run(StepPace(100 * MS, 1024), 1000, 4) == [FIRST_TOKENS, 2 * FIRST_TOKENS, 1024, 1024]


def test_a_slow_machine_gets_steps_that_take_the_time() -> None:
    assert run(StepPace(100 * MS, 1024), MS)[-1] == 100
    assert run(StepPace(100 * MS, 1024), 100 * MS)[-1] == LEAST_TOKENS


def test_one_hiccup_costs_a_quarter() -> None:
    pace = StepPace(100 * MS, 1024)
    run(pace, 1000)
    pace.note(1024, 100_000 * MS)
    assert pace.limit_tokens == 768
    pace.note(768, MS)
    assert pace.limit_tokens == 1024


def test_small_steps_say_nothing() -> None:
    pace = StepPace(100 * MS, 1024)
    pace.note(FIRST_TOKENS // 2 - 1, 99 * MS)
    assert pace.limit_tokens == FIRST_TOKENS


@given(most=st.integers(1, 4096), steps=st.lists(st.tuples(st.integers(1, 4096), st.integers(0, 10**12))))
def test_the_limit_stays_between_its_ends(most: int, steps: list[tuple[int, int]]) -> None:
    pace = StepPace(100 * MS, most)
    for token_count, duration_ns in steps:
        pace.note(token_count, duration_ns)
        assert min(LEAST_TOKENS, most) <= pace.limit_tokens <= most


@pytest.mark.parametrize(("is_chosen", "expected"), [(False, 80), (True, 256)])
def test_the_engine_reads_prompts_in_chunks_that_fit_unless_told_otherwise(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, is_chosen: bool, expected: int
) -> None:
    """With two layers a step may take 80 ms; here every token takes one."""
    clock = ManualClock()
    monkeypatch.setattr("polyphase.engines.torch.engine.MonotonicClock", lambda: clock)
    settings = TorchSettings(
        model=model_folder("llama"), thread_count=1, device="cpu", kv_bytes=8 << 20, max_batch_tokens=256 if is_chosen else None
    )
    engine = assemble(settings)
    sizes = []
    forward = engine._runner.forward

    def slow(rows, *others):  # type: ignore[no-untyped-def]
        sizes.append(sum(len(row.token_ids) for row in rows))
        clock.advance(sizes[-1] * MS)
        return forward(rows, *others)

    monkeypatch.setattr(engine._runner, "forward", slow)
    engine.submit(submit("a", prompt_of(1500), 2))
    while engine.core.has_requests:
        engine.step()
    engine.close()
    assert sizes[-3] == expected
    assert sum(sizes) == 1501
