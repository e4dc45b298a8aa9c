"""Follows, worker by worker, how predictions and reports of cached tokens agree, and says when they drift apart.

A worker that has just joined is not judged, because its index is still being filled; old samples leave the window; an alarm ends only when
clearly fewer requests differ than began it. Pure: the caller brings samples, facts and the time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from polyphase.core.ids import Epoch, WorkerId
from polyphase.router.drift import ALARM_FRACTION, Drift, Sample, StreamFacts, diagnose

WINDOW_SAMPLES = 64
WINDOW_NS = 600 * 10**9
CLEAR_FRACTION = 0.10  # lower than the one that begins it, so that an alarm does not flicker
SETTLE_NS = 10 * 10**9  # from a worker's joining; requests routed before are not judged


@dataclass(slots=True)
class _Watched:
    epoch: Epoch
    block_size: int
    joined_ns: int
    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=WINDOW_SAMPLES))
    repairs: deque[tuple[int, int]] = field(default_factory=deque)  # when, how many so far
    drift: Drift | None = None


class DriftWatch:
    """The windows of all workers, and which of them drift now."""

    def __init__(self) -> None:
        self._watched: dict[WorkerId, _Watched] = {}

    def begin(self, worker_id: WorkerId, epoch: Epoch, block_size: int, now_ns: int) -> None:
        """A worker joined. For the same life again, nothing happens; a new life begins with an empty window."""
        known = self._watched.get(worker_id)
        if known is None or known.epoch != epoch:
            self._watched[worker_id] = _Watched(epoch, block_size, now_ns)

    def forget(self, worker_id: WorkerId) -> None:
        self._watched.pop(worker_id, None)

    def note(self, worker_id: WorkerId, epoch: Epoch, sample: Sample) -> None:
        """Other lives than the present one, and requests routed before the worker had settled, are ignored."""
        watched = self._watched.get(worker_id)
        if watched is not None and watched.epoch == epoch and sample.routed_ns >= watched.joined_ns + SETTLE_NS:
            watched.samples.append(sample)

    def judge(self, worker_id: WorkerId, stream: StreamFacts, now_ns: int) -> Drift | None:
        """How this worker drifts now, if it does. `stream.repair_count` is of its whole life here."""
        watched = self._watched.get(worker_id)
        if watched is None:
            return None
        oldest_ns = now_ns - WINDOW_NS
        repairs = _in_window(watched.repairs, stream.repair_count, now_ns, oldest_ns)
        while watched.samples and watched.samples[0].routed_ns < oldest_ns:
            watched.samples.popleft()
        if not watched.samples:
            watched.drift = None
            return None
        facts = replace(stream, repair_count=repairs)
        threshold = ALARM_FRACTION if watched.drift is None else CLEAR_FRACTION
        watched.drift = diagnose(watched.samples, facts, watched.block_size, threshold)
        return watched.drift


def _in_window(counts: deque[tuple[int, int]], count: int, now_ns: int, oldest_ns: int) -> int:
    """How much a growing count has grown in the window."""
    if not counts or counts[-1][1] != count:
        counts.append((now_ns, count))
    while len(counts) > 1 and counts[1][0] <= oldest_ns:
        counts.popleft()
    return count - (counts[0][1] if counts[0][0] <= oldest_ns else 0)
