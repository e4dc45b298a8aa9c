"""Names why the router's predictions of cached tokens and what an engine reports drift apart, worker by worker.

    sample      one request: predicted when it was routed, reported when it ran, known to the index a moment later
    agrees      within a block; or the index has learnt in the meantime what it could not know (a prefix computed after routing)
    under       the engine found more than the router knew of, and the index knows no better a moment later
    over        the engine found less than the router had been told of

A few requests that differ are life; `MIN_SAMPLES` that tell something, of which `ALARM_FRACTION` differ, are a fault with a name.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

MIN_SAMPLES = 12
ALARM_FRACTION = 0.25
SILENT_AFTER_NS = 5 * 10**9  # workers publish once a second
MIN_DISTINCT_HITS = 6  # that several hits share a larger divisor than the block size may be chance; six rarely


class DriftReason(enum.StrEnum):
    SILENT_STREAM = "silent-stream"
    BLOCK_SIZE = "block-size"
    SALT = "salt"
    HASH_RECIPE = "hash-recipe"
    LOST_EVENTS = "lost-events"
    EVICTION = "eviction"
    NOT_REPORTED = "not-reported"


class Verdict(enum.Enum):
    SILENT = enum.auto()  # nothing was cached and nothing expected, or it cannot be told
    AGREES = enum.auto()
    UNDER = enum.auto()
    OVER = enum.auto()


@dataclass(frozen=True, slots=True)
class Sample:
    """One leg of one request. Counts are tokens; transferred tokens count nowhere.

    `known_later`: what the index held of this prompt for this worker a moment after it ran. `removed_block_count`: blocks of the worker
    that were announced as removed between routing and that moment.
    """

    routed_ns: int
    prompt_tokens: int
    predicted: int
    reported: int
    known_later: int
    removed_block_count: int = 0
    is_salted: bool = False

    def verdict(self, block_size: int) -> Verdict:
        predicted, reported = self.predicted, self.reported
        if max(predicted, reported) == 0:
            return Verdict.SILENT
        if reported <= predicted - block_size:
            return Verdict.OVER
        if reported < predicted + block_size or self.known_later > reported - block_size:
            return Verdict.AGREES
        # Known meanwhile and evicted again, perhaps; an index that knows nothing of a prompt that has just run has never known it.
        return Verdict.SILENT if self.removed_block_count and self.known_later else Verdict.UNDER


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """What is known of a worker's event stream and pool when its samples are judged."""

    silent_ns: int | None  # since the last batch; None: there was none in this life
    indexed_block_count: int
    held_block_count: int  # as the worker reports
    pool_block_count: int
    repair_count: int = 0  # gaps and digest mismatches in the window


@dataclass(frozen=True, slots=True)
class Drift:
    """`message` is a sentence for a person, saying what differs, why probably, and what to do."""

    reason: DriftReason
    differing_count: int
    sample_count: int
    predicted_tokens: int
    reported_tokens: int
    message: str


def diagnose(samples: Sequence[Sample], stream: StreamFacts, block_size: int, alarm_fraction: float = ALARM_FRACTION) -> Drift | None:
    """The likely reason why these samples differ, or None if too few do."""
    judged = [(sample, verdict) for sample in samples if (verdict := sample.verdict(block_size)) is not Verdict.SILENT]
    under = [sample for sample, verdict in judged if verdict is Verdict.UNDER]
    over = [sample for sample, verdict in judged if verdict is Verdict.OVER]
    differing = len(under) + len(over)
    if len(judged) < MIN_SAMPLES or differing < alarm_fraction * len(judged):
        return None
    agreeing = [sample for sample, verdict in judged if verdict is Verdict.AGREES]
    reason, why = _of_under(under, agreeing, stream, block_size) if len(under) >= len(over) else _of_over(over, agreeing, stream)
    predicted, reported = (sum(getattr(sample, name) for sample, _ in judged) for name in ("predicted", "reported"))
    head = f"of {len(judged)} requests, {differing} found other cached tokens than predicted ({reported} in all, {predicted} predicted)"
    return Drift(reason, differing, len(judged), predicted, reported, f"{head}: {why}")


def _of_under(under: Sequence[Sample], agreeing: Sequence[Sample], stream: StreamFacts, block_size: int) -> tuple[DriftReason, str]:
    if (silence := _silence(stream)) is not None:
        return DriftReason.SILENT_STREAM, silence
    if _is_salt(under, agreeing):
        return DriftReason.SALT, "only requests with a cache_salt differ; router and engine do not mix it into their hashes in the same way"
    if (size := _other_block_size(under, block_size)) is not None:
        return (
            DriftReason.BLOCK_SIZE,
            f"the engine's hits come in steps of {size} tokens, its card says blocks of {block_size}; start it with the size it announces",
        )
    if stream.repair_count:
        return DriftReason.LOST_EVENTS, f"its event stream lost events and was repaired {_times(stream.repair_count)}; look at its load"
    if not any(sample.predicted for sample in agreeing):
        return (
            DriftReason.HASH_RECIPE,
            f"{stream.indexed_block_count} blocks are announced and none ever matches a prompt; its events hash tokens in another way",
        )
    return DriftReason.LOST_EVENTS, "some of what it caches is never announced; blocks are missing in its event stream"


def _of_over(over: Sequence[Sample], agreeing: Sequence[Sample], stream: StreamFacts) -> tuple[DriftReason, str]:
    if not any(sample.reported for sample in (*over, *agreeing)):
        return DriftReason.NOT_REPORTED, "the engine reports no cached tokens at all; its prefix cache is off, or it does not tell"
    if _is_salt(over, agreeing):
        return DriftReason.SALT, "only requests with a cache_salt differ; router and engine do not mix it into their hashes in the same way"
    evicting = sum(sample.removed_block_count > 0 for sample in over)
    if 2 * evicting >= len(over):
        full = 100 * stream.held_block_count // max(stream.pool_block_count, 1)
        return DriftReason.EVICTION, f"blocks are evicted between routing and running; its KV cache, {full} % full, is small for this load"
    if (silence := _silence(stream)) is not None:
        return DriftReason.SILENT_STREAM, silence
    return DriftReason.LOST_EVENTS, "the index holds blocks that the worker no longer has; their removal was never announced"


def _silence(stream: StreamFacts) -> str | None:
    if stream.silent_ns is None:
        return "nothing of its event stream has ever arrived; look for what keeps it from connecting"
    if stream.silent_ns >= SILENT_AFTER_NS:
        return f"its event stream has been silent for {stream.silent_ns / 1e9:.0f} s; look at its log"
    if stream.indexed_block_count == 0 and stream.held_block_count > 0:
        return f"it holds {stream.held_block_count} blocks and announces none; its cache events are off"
    return None


def _is_salt(differing: Sequence[Sample], agreeing: Sequence[Sample]) -> bool:
    """All that differ are salted, and of those that are not, several agree."""
    return all(sample.is_salted for sample in differing) and sum(not sample.is_salted for sample in agreeing) >= 3


def _other_block_size(under: Sequence[Sample], block_size: int) -> int | None:
    """The step in which hits come, if it is not the block size."""
    # A hit that ends with the prompt was cut there, and tells nothing of blocks.
    hits = [sample.reported for sample in under if sample.reported < sample.prompt_tokens - 1]
    step = math.gcd(*hits)
    if not hits or step == block_size:
        return None
    if 2 * sum(hit % block_size != 0 for hit in hits) >= len(hits):
        return step
    return step if step % block_size == 0 and len(set(hits)) >= MIN_DISTINCT_HITS else None


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
