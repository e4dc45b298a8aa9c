"""What a simulated run is judged by."""

from __future__ import annotations

from collections import Counter
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
    refusal_count: int = 0  # by workers, after which another one was tried

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_ns is None else (self.first_token_ns - self.arrived_ns) / 1e9


@dataclass(frozen=True, slots=True)
class Measures:
    request_count: int
    refused_count: int
    hit_rate: float  # of all prompt tokens, found in the prefix cache where they were computed
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    busy_spread: float  # busy time of the busiest worker over that of an average one
    overload_tokens: float  # by which the fullest worker's queue exceeds an average one's, mean over the arrivals
    worst_overload_tokens: float  # and the most that it ever was
    busy_share: float  # of the time, by an average worker


def measure(records: Sequence[RequestRecord], busy_ns: Sequence[int], end_ns: int) -> Measures:
    """Requests that were refused count in `refused_count` alone. `busy_ns` has an entry for each worker."""
    served = [record for record in records if record.ttft_s is not None]
    ttft_s = sorted(record.ttft_s for record in served if record.ttft_s is not None)
    mean_busy_ns = sum(busy_ns) / len(busy_ns)
    overloads = _overloads(served, len(busy_ns))
    return Measures(
        request_count=len(records),
        refused_count=sum(record.refused is not None for record in records),
        hit_rate=sum(r.cached_token_count for r in served) / max(1, sum(r.prompt_token_count for r in served)),
        ttft_mean_s=sum(ttft_s) / max(1, len(ttft_s)),
        ttft_p50_s=_percentile(ttft_s, 0.5),
        ttft_p99_s=_percentile(ttft_s, 0.99),
        busy_spread=max(busy_ns) / mean_busy_ns if mean_busy_ns else 1.0,
        overload_tokens=sum(overloads) / max(1, len(overloads)),
        worst_overload_tokens=max(overloads, default=0.0),
        busy_share=mean_busy_ns / max(1, end_ns),
    )


def _overloads(served: Sequence[RequestRecord], worker_count: int) -> list[float]:
    """At each arrival, how many more tokens the fullest worker has to compute than an average one.

    Counted are the tokens that really were computed for the requests there which had no token yet: only afterwards can one know what
    would be found in the cache.
    """
    changes = []
    for record in served:
        assert record.first_token_ns is not None, "only requests that were served are counted"
        to_compute = record.prompt_token_count - record.cached_token_count
        changes += [(record.arrived_ns, to_compute, record.worker_id), (record.first_token_ns, -to_compute, record.worker_id)]
    changes.sort(key=lambda change: change[0])
    queues: Counter[WorkerId | None] = Counter()
    overloads = []
    for _, tokens, worker_id in changes:
        queues[worker_id] += tokens
        if tokens > 0:
            overloads.append(max(queues.values()) - queues.total() / worker_count)
    return overloads


def _percentile(ordered: Sequence[float], fraction: float) -> float:
    """Nearest rank; 0 of nothing."""
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))] if ordered else 0.0
