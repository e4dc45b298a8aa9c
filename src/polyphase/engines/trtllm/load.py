"""TensorRT-LLM's load: `/metrics` is a queue of iterations' statistics as JSON, taken out by whoever asks.

It holds something only with `enable_iter_perf_stats`. An empty answer says nothing new, not that nothing runs. Source: TensorRT-LLM's
documentation of `trtllm-serve`, and the fields of its `IterationStats`.
"""

from __future__ import annotations

import msgspec

from polyphase.core.errors import WireError
from polyphase.engines.served.dialect import Gauges

PATH = "/metrics"


class KvStats(msgspec.Struct, rename="camel"):
    max_num_blocks: int = 0
    used_num_blocks: int = 0
    tokens_per_block: int = 0


class Iteration(msgspec.Struct, rename="camel"):
    iter: int = 0
    num_active_requests: int = 0
    num_queued_requests: int = 0
    max_num_active_requests: int = 0
    kv_cache_stats: KvStats | None = None
    attention_dp_rank: int | None = None


def iterations_of(page: bytes) -> list[Iteration]:
    """Oldest first. Raises: WireError."""
    try:
        return msgspec.json.decode(page, type=list[Iteration])
    except msgspec.DecodeError as error:
        raise WireError(f"TensorRT-LLM's statistics cannot be understood: {error}") from error


class LoadReader:
    """Remembers the last iteration, since an idle server tells of none."""

    def __init__(self) -> None:
        self._gauges = Gauges()

    def gauges_of(self, page: bytes) -> Gauges:
        """Over all ranks: counts add up, and the fullest cache counts. Raises: WireError."""
        latest = {iteration.attention_dp_rank or 0: iteration for iteration in iterations_of(page)}
        if latest:
            ranks = latest.values()
            self._gauges = Gauges(
                running_count=sum(max(0, rank.num_active_requests) for rank in ranks),
                waiting_count=sum(rank.num_queued_requests for rank in ranks),
                used_share=max(_used_share(rank.kv_cache_stats) for rank in ranks),
                iterations=max(rank.iter for rank in ranks),
            )
        return self._gauges


def _used_share(stats: KvStats | None) -> float:
    return stats.used_num_blocks / stats.max_num_blocks if stats is not None and stats.max_num_blocks else 0.0
