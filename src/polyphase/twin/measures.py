"""What a simulated run is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyphase.core.ids import RequestId, WorkerId


@dataclass(slots=True)
class RequestRecord:
    """What one request saw."""

    request_id: RequestId
    arrived_ns: int
    prompt_token_count: int
    worker_id: WorkerId | None = None
    predicted_block_count: int = 0
    cached_token_count: int = 0
    first_token_ns: int | None = None
    ended_ns: int | None = None
    refused: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_ns is None else (self.first_token_ns - self.arrived_ns) / 1e9


@dataclass(frozen=True, slots=True)
class QueueSample:
    """Uncomputed prompt tokens on the worker that has most of them, and on an average one, at one instant."""

    worst_tokens: int
    mean_tokens: float


@dataclass(frozen=True, slots=True)
class Measures:
    request_count: int
    refused_count: int
    hit_rate: float  # of all prompt tokens, found in the prefix cache where they were computed
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    busy_spread: float  # busy time of the busiest worker over that of an average one
    queue_excess_tokens: float  # mean over time of worst minus average queue
    worst_excess_tokens: float  # and the most that it ever was
    busy_share: float  # of the time, by an average worker


def measure(records: Sequence[RequestRecord], busy_ns: Sequence[int], samples: Sequence[QueueSample], end_ns: int) -> Measures:
    """Requests that were refused count in `refused_count` alone."""
    served = [record for record in records if record.ttft_s is not None]
    ttft_s = sorted(record.ttft_s for record in served if record.ttft_s is not None)
    mean_busy_ns = sum(busy_ns) / len(busy_ns)
    excess = [sample.worst_tokens - sample.mean_tokens for sample in samples]
    return Measures(
        request_count=len(records),
        refused_count=sum(record.refused is not None for record in records),
        hit_rate=sum(r.cached_token_count for r in served) / max(1, sum(r.prompt_token_count for r in served)),
        ttft_mean_s=sum(ttft_s) / max(1, len(ttft_s)),
        ttft_p50_s=_percentile(ttft_s, 0.5),
        ttft_p99_s=_percentile(ttft_s, 0.99),
        busy_spread=max(busy_ns) / mean_busy_ns if mean_busy_ns else 1.0,
        queue_excess_tokens=sum(excess) / max(1, len(excess)),
        worst_excess_tokens=max(excess, default=0.0),
        busy_share=mean_busy_ns / max(1, end_ns),
    )


def _percentile(ordered: Sequence[float], fraction: float) -> float:
    """Nearest rank; 0 of nothing."""
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))] if ordered else 0.0
