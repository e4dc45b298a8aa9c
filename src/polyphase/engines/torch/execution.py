"""The heavy part of a step, done in the engine's thread: pull offered blocks, run the model, sample. Changes no bookkeeping.

A step that nobody wants any more is broken off at the model's next layer, so that a client who leaves during a long prompt frees its blocks
at once.
"""

from __future__ import annotations

from collections.abc import Callable

from polyphase.engines.batching.outcome import SampledToken, StepOutcome
from polyphase.engines.batching.scheduler import Row, StepPlan
from polyphase.engines.batching.sequence import Sequence
from polyphase.engines.batching.storage import pull_blocks
from polyphase.engines.torch.batch import PackedRow
from polyphase.engines.torch.runner import ModelRunner
from polyphase.engines.torch.sampling import SamplingRow, sample
from polyphase.engines.torch.storage import KvStorage


def execute(plan: StepPlan, storage: KvStorage, runner: ModelRunner) -> StepOutcome:
    """Does not raise: what goes wrong ends the requests of this step only.

    On return the blocks hold what was computed. A device might otherwise still write into blocks that the bookkeeping shows to other
    workers, as with the chunks of a long prompt, whose steps sample nothing and so wait for nothing; or, after a step that was broken off,
    into blocks that belong to others meanwhile.
    """
    outcome = StepOutcome()
    try:
        try:
            outcome.pulls = [pull_blocks(pull, storage) for pull in plan.pulls]
            failed = {result.pull.sequence for result in outcome.pulls if result.error is not None}
            rows = [row for row in plan.rows if row.sequence not in failed]
            if rows:
                outcome.samples = _compute(rows, runner, lambda: plan.is_interrupted)
            outcome.computed = rows
        finally:
            storage.settle()
    except Exception as error:  # noqa: BLE001  the root of the engine's work: a model may raise anything
        # A recorded model wraps what attention raises, so the flag says whether it was the interruption.
        if not plan.is_interrupted:
            outcome.error = error
    return outcome


def _compute(rows: list[Row], runner: ModelRunner, is_interrupted: Callable[[], bool]) -> dict[Sequence, SampledToken | None]:
    packed = [
        PackedRow(
            row.sequence.token_ids[row.start : row.start + row.count],
            row.start,
            row.sequence.blocks.block_ids,
            row.sequence.request.lora,
        )
        for row in rows
    ]
    is_sampled = [row.is_sampled for row in rows]
    logits, places = runner.forward(packed, is_sampled, is_interrupted)
    if not places:
        return {}
    sequences = [rows[place].sequence for place in places]
    wanted = [
        SamplingRow(
            sequence.sampling,
            sequence.output_count,
            sequence.stop.forbidden_ids(sequence.output_count),
            None if sequence.grammar is None else sequence.grammar.allowed(),  # on a GPU, while that still computes the logits
        )
        for sequence in sequences
    ]
    return dict(zip(sequences, sample(logits, wanted), strict=True))
