"""The prefix index and the event streams that fill it, for Prometheus, as of each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from polyphase.router import IndexFill
from polyphase.runtime import StreamView

INDEX = "polyphase_router_index"
STREAM = "polyphase_router_stream"


class IndexCollector(Collector):
    def __init__(self, fill: Callable[[], IndexFill], streams: Callable[[], Mapping[str, StreamView]]) -> None:
        self._fill = fill
        self._streams = streams

    def collect(self) -> Iterable[Metric]:
        fill = self._fill()
        yield GaugeMetricFamily(f"{INDEX}_blocks", "Different KV blocks in the prefix index", fill.block_count)
        yield GaugeMetricFamily(f"{INDEX}_capacity_blocks", "Blocks that it holds at most", fill.capacity)
        yield GaugeMetricFamily(f"{INDEX}_bytes", "Memory that it takes, about", fill.heap_bytes)
        yield GaugeMetricFamily(
            f"{INDEX}_believed_blocks", "Blocks that workers without events are believed to hold", fill.believed_block_count
        )
        yield CounterMetricFamily(f"{INDEX}_forgotten_blocks", "Blocks lost for want of room in the index", fill.forgotten_block_count)
        yield from self._of_streams()

    def _of_streams(self) -> Iterable[Metric]:
        synced = GaugeMetricFamily(f"{STREAM}_synced", "1 if all that the worker published is in the index", labels=["worker"])
        gaps = CounterMetricFamily(f"{STREAM}_gaps", "Times that event batches of a worker were missing", labels=["worker"])
        repairs = CounterMetricFamily(f"{STREAM}_repairs", "Gaps that were closed with the missing batches", labels=["worker"])
        drifts = CounterMetricFamily(f"{STREAM}_drifts", "Times that the index differed from what a worker holds", labels=["worker"])
        snapshots = CounterMetricFamily(f"{STREAM}_snapshots", "Times that all that a worker holds was fetched", labels=["worker"])
        for worker_id, stream in self._streams().items():
            counts = stream.counts
            synced.add_metric([worker_id], stream.is_synced)
            gaps.add_metric([worker_id], counts.gaps)
            repairs.add_metric([worker_id], counts.repairs)
            drifts.add_metric([worker_id], counts.drifts)
            snapshots.add_metric([worker_id], counts.snapshots)
        return (synced, gaps, repairs, drifts, snapshots)
