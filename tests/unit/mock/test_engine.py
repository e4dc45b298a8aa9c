"""The mock engine on an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from polyphase.core.clock import ManualClock
from polyphase.core.errors import ModelNotFound
from polyphase.engines.interface import StepReport
from polyphase.engines.mock.engine import MockEngine, load_mock_engine
from polyphase.wire.requests import FinishReason
from tests.unit.mock.building import ask, machine, settings, submit

PROMPT = list(range(40))


@pytest.fixture
def engine() -> Iterator[MockEngine]:
    made = load_mock_engine(settings(speedup=float("inf")))
    yield made
    made.close()


async def reports_until(engine: MockEngine, count: int) -> list[StepReport]:
    """Run until so many requests have ended."""
    reports: list[StepReport] = []
    done = asyncio.Event()

    def on_step(report: StepReport) -> None:
        reports.append(report)
        if sum(output.finish_reason is not None for one in reports for output in one.outputs) == count:
            done.set()

    task = asyncio.create_task(engine.run(on_step))
    async with asyncio.timeout(30):
        await done.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return reports


async def test_it_answers_many_at_once(engine: MockEngine) -> None:
    for number in range(5):
        engine.submit(submit(f"r{number}", [*PROMPT, number], 30))
    reports = await reports_until(engine, 5)
    clock = ManualClock()
    for number in range(5):
        tokens = [token for one in reports for output in one.outputs if output.request_id == f"r{number}" for token in output.token_ids]
        assert tokens == ask(machine(clock), clock, submit("x", [*PROMPT, number], 30))
    assert (engine.load().running_count, engine.load().used_block_count) == (0, 0)


async def test_steps_take_the_time_they_should() -> None:
    engine = load_mock_engine(settings(speedup=1.0))
    engine.submit(submit("a", PROMPT, 6))
    began_s = asyncio.get_running_loop().time()
    await reports_until(engine, 1)
    assert asyncio.get_running_loop().time() - began_s >= 6 * 0.006, "six steps, each reading 16 GB of weights"
    engine.close()


async def test_what_is_aborted_ends_as_cancelled(engine: MockEngine) -> None:
    engine.submit(submit("a", PROMPT, 8))
    engine.abort("a")
    engine.abort("unknown")
    reports = await reports_until(engine, 1)
    assert reports[-1].outputs[-1].finish_reason is FinishReason.CANCELLED
    assert engine.load().used_block_count == 0


async def test_with_an_adapter_the_answers_are_others() -> None:
    answers = {}
    for prompt in (PROMPT[:5], PROMPT):  # without a full block, and with one
        for lora in (None, "sql", "poet"):
            clock = ManualClock()
            made = machine(clock, adapters=("sql", "poet"))
            answers[len(prompt), lora] = tuple(ask(made, clock, submit("r", prompt, 12, lora=lora)))
            assert answers[len(prompt), lora] == tuple(ask(made, clock, submit("again", prompt, 12, lora=lora)))
    assert len(set(answers.values())) == 6
    with pytest.raises(ModelNotFound):
        machine().core.submit(submit("r", PROMPT, lora="sql"), None)
