"""What became of the latest requests, for `/debug/requests`: where each phase ran, why, and what it cost."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from polyphase.core.ids import RequestId
from polyphase.frontend.history import Attempt, History, candidates_json
from polyphase.router import Route
from polyphase.wire.requests import PhaseStats

MAX_GAPS = 8192  # inter-token times kept of one sequence while it runs
MAX_CHOICES_SHOWN = 16


@dataclass(slots=True)
class SequenceRecord:
    """One sequence: written by the dispatcher as things happen. Times are of the monotonic clock."""

    started_ns: int
    history: History = field(default_factory=History)
    queued_ns: int = 0  # when it began to wait here for a worker with room; 0 if it did not
    admitted_ns: int = 0  # when that was over
    stats: PhaseStats | None = None  # of the leg that computed the prompt
    transferred_tokens: int = 0
    kv_bytes_moved: int = 0
    transfer_ms: float = 0.0
    completion_tokens: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    gaps_ms: list[float] = field(default_factory=list)  # time between tokens, at this frontend
    migrations: int = 0  # after a worker was lost, failed or stood still
    refusals: int = 0  # by workers that had no room for it, or were not what they had been taken for
    moves: int = 0  # handed over by a worker that drains or has another role
    ended_ns: int = 0

    @property
    def route(self) -> Route | None:
        """The latest one."""
        attempts = self.history.attempts
        return attempts[-1].route if attempts else None

    @property
    def attempt(self) -> Attempt | None:
        attempts = self.history.attempts
        return attempts[-1] if attempts else None

    @property
    def predicted_cached_tokens(self) -> int:
        """Where the prompt is computed; once an engine has reported its own figure, in that attempt."""
        reported = (attempt for attempt in self.history.attempts if attempt.has_report)
        attempt = next(reported, self.attempt)
        return attempt.predicted_cached_tokens(attempt.prompt_leg) if attempt else 0

    @property
    def cached_tokens(self) -> int:
        return self.stats.cached_token_count if self.stats else 0

    @property
    def admission_wait_ms(self) -> float | None:
        """Here, before it was first sent to a worker; None while it waits. A request that never waited has 0."""
        if not self.queued_ns:
            return 0.0
        until_ns = self.admitted_ns or self.ended_ns
        return (until_ns - self.queued_ns) / 1e6 if until_ns else None

    @property
    def ttft_ms(self) -> float | None:
        return (self.first_token_ns - self.started_ns) / 1e6 if self.first_token_ns else None

    def note_tokens(self, count: int, now_ns: int) -> float | None:
        """Count tokens that arrived together. Returns: milliseconds per token since the last ones, None for the first."""
        gap_ms = None
        if not self.first_token_ns:
            self.first_token_ns = now_ns
        else:
            gap_ms = (now_ns - self.last_token_ns) / 1e6 / count
            if len(self.gaps_ms) < MAX_GAPS:
                self.gaps_ms.append(gap_ms)
        self.last_token_ns = now_ns
        self.completion_tokens += count
        return gap_ms

    def note_stats(self, stats: PhaseStats) -> None:
        """With the first tokens, or with the last ones: servers tell at the end what they had cached. Of a later worker, it is no news."""
        if not self.first_token_ns or (self.stats is None and not self.migrations and not self.moves):
            self.stats = stats
        self.transferred_tokens += stats.transferred_token_count
        self.kv_bytes_moved += stats.transferred_bytes
        self.transfer_ms += stats.transfer_ms


@dataclass(slots=True)
class RequestRecord:
    """One HTTP request; figures of several sequences are sums, and places are those of the first."""

    id: str
    answer_id: str
    model: str
    endpoint: str
    created_unix_s: int
    prompt_tokens: int
    sequences: list[SequenceRecord] = field(default_factory=list)
    status: str = "running"  # running | finished | cancelled | failed
    finish_reason: str | None = None
    error: str | None = None
    passed: str | None = None  # what it was passed through for, such as images; its prompt tokens are a guess unless the engine told
    asked_for: str | None = None  # the model's name as the client gave it, where that is an alias

    def as_json(self) -> dict[str, Any]:
        first = self.sequences[0] if self.sequences else None
        route = first.route if first else None
        gaps = sorted(gap for sequence in self.sequences for gap in sequence.gaps_ms)
        return {
            "id": self.id,
            "answer_id": self.answer_id,
            "model": self.model,
            "asked_for": self.asked_for,
            "endpoint": self.endpoint,
            "passed_through": self.passed,
            "created": self.created_unix_s,
            "status": self.status,
            "prefill_worker": prefill_worker(route),
            "decode_worker": route.decode.worker_id if route else None,
            "split": bool(route and route.prefill),
            "reason": route.reason if route else None,
            "rule": route.rule if route else None,
            "prompt_tokens": self.prompt_tokens,
            "predicted_cached_tokens": first.predicted_cached_tokens if first else 0,
            "cached_tokens": first.cached_tokens if first else 0,
            "transferred_tokens": sum(sequence.transferred_tokens for sequence in self.sequences),
            "kv_bytes_moved": sum(sequence.kv_bytes_moved for sequence in self.sequences),
            "transfer_ms": _rounded(sum(sequence.transfer_ms for sequence in self.sequences)),
            "admission_wait_ms": _rounded(first.admission_wait_ms) if first else None,
            "queue_ms": _rounded(first.stats.queue_ms) if first and first.stats else None,
            "completion_tokens": sum(sequence.completion_tokens for sequence in self.sequences),
            "ttft_ms": _rounded(first.ttft_ms) if first else None,
            "itl_ms_mean": _rounded(sum(gaps) / len(gaps)) if gaps else None,
            "itl_ms_p99": _rounded(gaps[math.ceil(0.99 * len(gaps)) - 1]) if gaps else None,
            "refusals": sum(sequence.refusals for sequence in self.sequences),
            "moves": sum(sequence.moves for sequence in self.sequences),
            "migrations": sum(sequence.migrations for sequence in self.sequences),
            "choices": len(self.sequences),
            "finish_reason": self.finish_reason,
            "error": self.error,
            "candidates": _candidates(first.attempt if first else None),
        }

    def details(self) -> dict[str, Any]:
        """All of `as_json`, and the way of the first sequence: attempts with their candidates, and what happened when."""
        first = self.sequences[0] if self.sequences else None
        history = first.history if first else History()
        started_ns = first.started_ns if first else 0
        return {
            **self.as_json(),
            "duration_ms": _rounded((first.ended_ns - started_ns) / 1e6) if first and first.ended_ns else None,
            "routes": [attempt.as_json(started_ns) for attempt in history.attempts],
            "timeline": [moment.as_json(started_ns) for moment in history.moments],
            "other_choices": [_place(sequence.route) for sequence in self.sequences[1 : 1 + MAX_CHOICES_SHOWN]],
        }


def prefill_worker(route: Route | None) -> str | None:
    """Where the prompt is computed; the decode worker if the request is not split."""
    if route is None:
        return None
    return (route.prefill or route.decode).worker_id


def places_of(record: RequestRecord) -> dict[str, str]:
    """Headers: where the phases run and why, as far as it is known when the answer begins. Figures are tokens, of the first sequence."""
    first = record.sequences[0] if record.sequences else None
    route = first.route if first else None
    if first is None or route is None:
        return {}
    return {
        "x-polyphase-prefill-worker": prefill_worker(route) or "",
        "x-polyphase-decode-worker": route.decode.worker_id,
        "x-polyphase-route": route.rule or ("split" if route.prefill else "whole"),
        "x-polyphase-predicted-cached-tokens": str(first.predicted_cached_tokens),
        "x-polyphase-cached-tokens": str(first.cached_tokens),
    }


def _candidates(attempt: Attempt | None) -> list[dict[str, Any]]:
    if attempt is None:
        return []
    placements = [placement for placement in (attempt.route.prefill, attempt.route.decode) if placement is not None]
    return [row for placement in placements for row in candidates_json(placement, attempt.token_count)]


def _place(route: Route | None) -> dict[str, Any]:
    return {
        "prefill_worker": prefill_worker(route),
        "decode_worker": route.decode.worker_id if route else None,
        "reason": route.reason if route else None,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


class Records:
    """A ring: the oldest record goes when there are more than `limit`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_id: OrderedDict[RequestId, RequestRecord] = OrderedDict()
        self._names: dict[str, RequestId] = {}  # shown and answer ids; of several with one name, the latest

    def add(self, internal_id: RequestId, record: RequestRecord) -> None:
        self._by_id[internal_id] = record
        for name in (record.id, record.answer_id):
            self._names[name] = internal_id
        if len(self._by_id) > self._limit:
            oldest_id, oldest = self._by_id.popitem(last=False)
            for name in (oldest.id, oldest.answer_id):
                if self._names.get(name) == oldest_id:
                    del self._names[name]

    def find(self, name: str) -> RequestRecord | None:
        """By the header `x-request-id`, or by the answer's `id`."""
        internal_id = self._names.get(name)
        return None if internal_id is None else self._by_id[internal_id]

    def latest(self, count: int) -> list[RequestRecord]:
        """Newest first."""
        return [self._by_id[key] for key, _ in zip(reversed(self._by_id), range(count), strict=False)]
