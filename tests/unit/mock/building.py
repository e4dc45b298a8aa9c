"""Mock machines in virtual time, and short ways to ask them for tokens."""

from __future__ import annotations

from typing import Any

from polyphase.core.clock import ManualClock
from polyphase.engines.interface import BlockSource
from polyphase.engines.mock import MockSettings
from polyphase.engines.mock.assembly import assemble_mock
from polyphase.engines.mock.machine import MockMachine
from polyphase.launch.model_source import resolve_model
from polyphase.wire.requests import SamplingParams, SequenceOutput, StopConditions, Submit

MODEL = resolve_model("demo").location


def settings(**changes: Any) -> MockSettings:
    return MockSettings(**{"model": MODEL, "kv_bytes": 64 << 20, **changes})


def machine(clock: ManualClock | None = None, *, is_shared: bool = False, **changes: Any) -> MockMachine:
    return MockMachine(assemble_mock(settings(**changes), is_shared=is_shared), clock or ManualClock())


def submit(request_id: str, prompt: list[int], max_tokens: int = 8, emitted: list[int] | None = None, **fields: Any) -> Submit:
    return Submit(
        request_id=request_id,
        token_ids=prompt + (emitted or []),
        prompt_token_count=len(prompt),
        sampling=SamplingParams(seed=0),
        stop=fields.pop("stop", StopConditions(max_tokens=max_tokens, ignore_eos=True)),
        **fields,
    )


def run(engine: MockMachine, clock: ManualClock) -> list[SequenceOutput]:
    """Step until nothing is left, letting each step take its time."""
    outputs: list[SequenceOutput] = []
    while (step := engine.begin_step()) is not None:
        clock.advance(step.duration_ns)
        outputs += engine.finish_step(step).outputs
    idle = engine.core.take_idle_report()
    return outputs + (idle.outputs if idle else [])


def ask(engine: MockMachine, clock: ManualClock, request: Submit, source: BlockSource | None = None) -> list[int]:
    engine.core.submit(request, source)
    return [token for output in run(engine, clock) for token in output.token_ids]
