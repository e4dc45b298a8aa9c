"""Reads vLLM's `/metrics`: its load twice a second, and once what its KV cache is like."""

from __future__ import annotations

import math
from collections.abc import Iterator

import httpx
from prometheus_client.parser import text_string_to_metric_families

from polyphase.engines.served.dialect import Gauges, Sink
from polyphase.engines.served.polling import INTERVAL_S, LoadPoll

_PREFIX = "vllm:"


class MetricsObserver:
    """Implements `Observer`."""

    def __init__(self, interval_s: float = INTERVAL_S, rank: int | None = None) -> None:
        """`rank`: look at this data-parallel rank only."""
        self._poll = LoadPoll("vLLM", "/metrics", lambda page: gauges_of(page.decode(), rank), interval_s)

    async def watch(self, client: httpx.AsyncClient, sink: Sink) -> None:
        await self._poll.watch(client, sink)


def gauges_of(text: str, rank: int | None = None) -> Gauges:
    """Of one data-parallel rank, or of all: then counts add up, and the fullest cache counts."""
    gauges = Gauges()
    for name, value, labels in _samples(text):
        if rank is not None and labels.get("engine") != str(rank):
            continue
        match name:
            case "num_requests_running":
                gauges.running_count += int(value)
            case "num_requests_waiting":
                gauges.waiting_count += int(value)
            case "kv_cache_usage_perc":
                gauges.used_share = max(gauges.used_share, value)
            case "iteration_tokens_total_count":
                gauges.iterations += int(value)
            case "num_preemptions_total":
                gauges.preemptions += int(value)
    return gauges


def cache_of(text: str) -> tuple[int, int]:
    """Block size in tokens, and blocks; 0 for what it does not say."""
    for name, _, labels in _samples(text):
        if name == "cache_config_info":
            return _whole(labels.get("block_size")), _whole(labels.get("num_gpu_blocks"))
    return 0, 0


def cache_dtype_of(text: str) -> str:
    return next((labels.get("cache_dtype", "auto") for name, _, labels in _samples(text) if name == "cache_config_info"), "auto")


def ranks_of(text: str) -> int:
    """Data-parallel ranks, at least 1."""
    return max(1, len({labels.get("engine") for name, _, labels in _samples(text) if name == "num_requests_running"}))


def _samples(text: str) -> Iterator[tuple[str, float, dict[str, str]]]:
    """Only lines that we read are parsed: there are hundreds of others, and this happens twice a second."""
    wanted = "\n".join(line for line in text.splitlines() if line.startswith(_WANTED))
    for family in text_string_to_metric_families(wanted + "\n"):
        for sample in family.samples:
            if not math.isnan(sample.value):
                yield sample.name.removeprefix(_PREFIX), sample.value, sample.labels


def _whole(text: str | None) -> int:
    return int(text) if text is not None and text.isdigit() else 0


_WANTED = tuple(
    _PREFIX + name
    for name in (
        "num_requests_running",
        "num_requests_waiting{",
        "kv_cache_usage_perc",
        "iteration_tokens_total_count",
        "num_preemptions_total",
        "cache_config_info",
    )
)
