"""The heavy part of a step, done in the engine's thread: pull offered blocks, run the model, sample. Changes no bookkeeping."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from polyphase.core.errors import TransferError
from polyphase.engines.torch.batch import PackedRow
from polyphase.engines.torch.runner import ModelRunner
from polyphase.engines.torch.sampling import SampledToken, SamplingRow, sample
from polyphase.engines.torch.scheduler import Pull, Row, StepPlan
from polyphase.engines.torch.sequence import Sequence
from polyphase.engines.torch.storage import KvStorage


@dataclass(frozen=True, slots=True)
class PullResult:
    pull: Pull
    byte_count: int
    duration_ms: float
    error: str | None


@dataclass(slots=True)
class StepOutcome:
    """`computed` are the rows that were run; `samples` has an entry for each of them that was to be sampled, None if that failed."""

    pulls: list[PullResult] = field(default_factory=list)
    computed: list[Row] = field(default_factory=list)
    samples: dict[Sequence, SampledToken | None] = field(default_factory=dict)
    error: Exception | None = None


def execute(plan: StepPlan, storage: KvStorage, runner: ModelRunner) -> StepOutcome:
    """Does not raise: what goes wrong ends the requests of this step only."""
    outcome = StepOutcome()
    try:
        outcome.pulls = [_pull(pull, storage) for pull in plan.pulls]
        failed = {result.pull.sequence for result in outcome.pulls if result.error is not None}
        rows = [row for row in plan.rows if row.sequence not in failed]
        if rows:
            outcome.samples = _compute(rows, runner)
        outcome.computed = rows
    except Exception as error:  # noqa: BLE001  the root of the engine's work: a model may raise anything
        outcome.error = error
    return outcome


def _pull(pull: Pull, storage: KvStorage) -> PullResult:
    offer, source = pull.sequence.offer, pull.sequence.source
    assert offer is not None, "the scheduler plans pulls only for sequences with an offer"
    assert source is not None, "the scheduler plans pulls only for sequences with an opened source"
    started_ns = time.monotonic_ns()
    block_ids = offer.block_ids[pull.first_block : -(-pull.token_count // storage.layout.block_size)]
    end = pull.first_block + len(block_ids)
    error: str | None = None
    try:
        storage.read_from(
            source,
            block_ids,
            offer.generations[pull.first_block : end],
            pull.sequence.blocks.block_ids[pull.first_block : end],
        )
    except (TransferError, OSError, ValueError, BufferError) as failure:
        error = str(failure)
    duration_ms = (time.monotonic_ns() - started_ns) / 1e6
    return PullResult(pull, len(block_ids) * storage.layout.block_bytes, duration_ms, error)


def _compute(rows: list[Row], runner: ModelRunner) -> dict[Sequence, SampledToken | None]:
    packed = [
        PackedRow(row.sequence.token_ids[row.start : row.start + row.count], row.start, row.sequence.blocks.block_ids) for row in rows
    ]
    is_sampled = [row.is_sampled for row in rows]
    logits, places = runner.forward(packed, is_sampled)
    if not places:
        return {}
    sequences = [rows[place].sequence for place in places]
    wanted = [
        SamplingRow(sequence.sampling, sequence.output_count, sequence.stop.forbidden_ids(sequence.output_count)) for sequence in sequences
    ]
    return dict(zip(sequences, sample(logits, wanted), strict=True))
