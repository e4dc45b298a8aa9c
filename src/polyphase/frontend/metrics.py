"""The frontend's and the router's figures for Prometheus. Names follow those of Dynamo's frontend, under our own prefix.

Labels are the names of served models and of workers only: nothing a client writes becomes a time series.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from polyphase.frontend.index_metrics import IndexCollector
from polyphase.router import IndexFill, WorkerView
from polyphase.runtime import StreamView

PREFIX = "polyphase_frontend"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_DURATION_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS = tuple(2**exponent for exponent in range(0, 18))
_DECISION_S = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 1e-2)


class ModelMetrics:
    """The children of one model's label, looked up once."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.active_requests = metrics.active_requests.labels(model)
        self.ttft_s = metrics.ttft_s.labels(model)
        self.itl_s = metrics.itl_s.labels(model)
        self.duration_s = metrics.duration_s.labels(model)
        self.input_tokens = metrics.input_tokens.labels(model)
        self.output_tokens = metrics.output_tokens.labels(model)
        self.cached_tokens = metrics.cached_tokens.labels(model)
        self.queue_wait_s = metrics.queue_wait_s.labels(model)
        self.migrations = metrics.migrations.labels(model)
        self.moves = metrics.moves.labels(model)
        self.cancellations = metrics.cancellations.labels(model)
        self.pulls_waived = metrics.pulls.labels(model, "does-not-pay")
        self._pulls_done = metrics.pulls.labels(model, "pulled")
        self._pulls_in_vain = metrics.pulls.labels(model, "in-vain")
        self._pulled_tokens = metrics.pulled_tokens.labels(model)

    def note_pull(self, token_count: int) -> None:
        """A worker was told of a holder, and got so many tokens' KV from there."""
        (self._pulls_done if token_count else self._pulls_in_vain).inc()
        self._pulled_tokens.inc(token_count)


class Metrics:
    """One registry per frontend, not the process-wide one, so that several can live in a test."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        by_model = ("model",)

        def counter(name: str, text: str, labels: tuple[str, ...] = by_model) -> Counter:
            return Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"{PREFIX}_{name}", text, by_model, buckets=buckets, registry=self.registry)

        self.requests = counter("requests", "Requests that ended, by how", ("model", "endpoint", "status"))
        passed_labels = ("model", "kinds", "status")
        self.passed_requests = counter("passed_requests", "Requests passed through to an engine that ended, by how", passed_labels)
        self.active_requests = Gauge(f"{PREFIX}_active_requests", "Requests accepted and not ended", by_model, registry=self.registry)
        self.ttft_s = histogram("time_to_first_token_seconds", "From acceptance to the first token", _TTFT_S)
        self.itl_s = histogram("inter_token_latency_seconds", "Between tokens of a sequence, as they arrive here", _ITL_S)
        self.duration_s = histogram("request_duration_seconds", "From acceptance to the end", _DURATION_S)
        self.input_tokens = histogram("input_sequence_tokens", "Prompt tokens", _TOKENS)
        self.output_tokens = histogram("output_sequence_tokens", "Tokens generated for a request", _TOKENS)
        self.cached_tokens = histogram("cached_tokens", "Prompt tokens found in a prefix cache", _TOKENS)
        self.migrations = counter("model_migration", "Sequences taken up by another worker")
        self.moves = counter("model_move", "Sequences handed over while they ran, because their worker drains or has another role")
        self.cancellations = counter("model_cancellation", "Requests whose client went away")
        self.rejections = counter("model_rejection", "Requests refused before anything was started, by error code", ("code",))
        self.queued_requests = Gauge(
            f"{PREFIX}_queued_requests", "Requests that wait here because every worker is saturated", by_model, registry=self.registry
        )
        self.queue_wait_s = histogram("queue_wait_seconds", "Of requests that had to wait here, until they were sent", _DURATION_S)
        by_reason = ("model", "reason")
        self.rejections_of_queue = counter("admission_rejections", "Requests that were not let wait, by reason", by_reason)
        self.evictions = counter("admission_evictions", "Requests turned out of the queue, by reason", by_reason)
        self.routes = Counter("polyphase_router_routes", "Decisions of the router", ("model", "kind"), registry=self.registry)
        self.pulls = Counter(
            "polyphase_router_kv_pulls",
            "Requests of whose prompt another worker held more, by what came of it: pulled, in-vain, does-not-pay",
            ("model", "outcome"),
            registry=self.registry,
        )
        self.pulled_tokens = Counter(
            "polyphase_router_kv_pulled_tokens", "Tokens whose KV came from another worker's cache", by_model, registry=self.registry
        )
        self.refusals = Counter(
            "polyphase_router_worker_refusals", "Requests that a worker sent back: its queue was full", ("worker",), registry=self.registry
        )
        self.role_changes = Counter(
            "polyphase_router_role_changes", "Times that a living worker took another role", ("worker", "role"), registry=self.registry
        )
        self.stalls = Counter(
            "polyphase_router_worker_stalls", "Times that a worker stood still though it was alive", ("worker",), registry=self.registry
        )
        predicted, reported = "polyphase_router_predicted_cached_tokens", "polyphase_router_reported_cached_tokens"
        self.predicted_cached_tokens = Counter(
            predicted, "Prompt tokens expected in a worker's cache when routed", ("worker",), registry=self.registry
        )
        self.reported_cached_tokens = Counter(reported, "Prompt tokens that the engine found there", ("worker",), registry=self.registry)
        self.prediction_drift = Gauge(
            "polyphase_router_prediction_drift",
            "1 while predicted and reported cached tokens of a worker drift apart, with the likely reason",
            ("worker", "reason"),
            registry=self.registry,
        )
        self.decision_s = Histogram(
            "polyphase_router_overhead_seconds", "Time of one decision", buckets=_DECISION_S, registry=self.registry
        )
        self._by_model: dict[str, ModelMetrics] = {}

    def of(self, model: str) -> ModelMetrics:
        """`model` must be a served one: each name is kept."""
        found = self._by_model.get(model)
        if found is None:
            found = self._by_model[model] = ModelMetrics(self, model)
        return found

    def count_rejection(self, code: str) -> None:
        self.rejections.labels(code).inc()

    def watch_workers(self, views: Callable[[], list[WorkerView]]) -> None:
        """Show what is booked on each worker and what it reports, as of each scrape."""
        self.registry.register(_WorkerCollector(views))

    def watch_index(self, fill: Callable[[], IndexFill], streams: Callable[[], Mapping[str, StreamView]]) -> None:
        """Show how full the prefix index is, and how the event streams do that it is filled from, as of each scrape."""
        self.registry.register(IndexCollector(fill, streams))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _WorkerCollector(Collector):
    def __init__(self, views: Callable[[], list[WorkerView]]) -> None:
        self._views = views

    def collect(self) -> Iterable[GaugeMetricFamily]:
        labels = ("worker", "model", "role")
        prefill = GaugeMetricFamily(f"{PREFIX}_worker_active_prefill_tokens", "Prompt tokens booked and not computed yet", labels=labels)
        blocks = GaugeMetricFamily(f"{PREFIX}_worker_active_decode_blocks", "KV blocks booked", labels=labels)
        requests = GaugeMetricFamily("polyphase_router_worker_booked_requests", "Requests booked", labels=labels)
        running = GaugeMetricFamily("polyphase_router_worker_running", "Running sequences, as reported", labels=labels)
        waiting = GaugeMetricFamily("polyphase_router_worker_waiting", "Waiting sequences, as reported", labels=labels)
        usage = GaugeMetricFamily("polyphase_router_worker_kv_usage_ratio", "Used part of the block pool, as reported", labels=labels)
        for view in self._views():
            label = (view.facts.worker_id, view.facts.model, view.facts.role.value)
            prefill.add_metric(label, view.booked_prefill_tokens)
            blocks.add_metric(label, view.booked_block_count)
            requests.add_metric(label, view.booked_request_count)
            if view.load is not None:
                running.add_metric(label, view.load.running_count)
                waiting.add_metric(label, view.load.waiting_count)
                usage.add_metric(label, view.load.used_block_count / max(view.load.block_count, 1))
        return (prefill, blocks, requests, running, waiting, usage)
