"""Which workers stand still: alive by the registry, and yet none of their requests gets on.

        steps · loads · what was sent ──► StallWatch ── check(now) ──► Stalled(worker, why) … Recovered(worker)

A worker is judged by its step counter, which outputs and load reports carry. It stands still if the counter has not moved for several
times as long as the longest step that is to be expected: the longest one seen lately, and what the tokens queued there would take at the
slowest pace seen lately. Until a worker has shown its pace, it may be compiling kernels, and gets much longer. A worker that says nothing
at all, not even its heartbeat of a second, is judged sooner: its process is stopped, and how long its steps are does not matter. And one
that says of itself that it can serve nothing (`Load.outage`) is taken at its word.

Values in, verdicts out; no clock of its own. A listener that was held up itself would see everybody stand still: `check` notices by the
time since its last call, and gives that time to all workers.
"""

from __future__ import annotations

from dataclasses import dataclass

from polyphase.core.ids import WorkerId
from polyphase.wire.events import Load

_S = 1_000_000_000
_PACE_FROM_TOKENS = 32  # in a step; fewer say nothing about the pace of a prompt
_STEP_TOKENS_FACTOR = 4  # an engine may compute more than its card's budget in a step in which nobody decodes


@dataclass(frozen=True, slots=True)
class StallRule:
    """Times in seconds."""

    interval_s: float = 0.25  # between checks
    factor: float = 5.0  # expected steps without a step
    least_s: float = 2.0  # whatever the steps take: processes are held up by others now and then
    unknown_s: float = 120.0  # while nothing is known of the worker's pace
    silence_s: float = 4.0  # heartbeats come every second
    memory_s: float = 60.0  # in which the longest step and the slowest pace seen lose half of their weight


@dataclass(frozen=True, slots=True)
class Stalled:
    worker_id: WorkerId
    reason: str  # a phrase for a person


@dataclass(frozen=True, slots=True)
class Recovered:
    worker_id: WorkerId


@dataclass(slots=True)
class _Fading:
    """The largest value seen lately; halves in `memory_ns`."""

    memory_ns: float
    value: float = 0.0
    at_ns: int = 0

    def note(self, value: float, now_ns: int) -> None:
        self.value, self.at_ns = max(value, self.now(now_ns)), now_ns

    def now(self, now_ns: int) -> float:
        return self.value * 0.5 ** ((now_ns - self.at_ns) / self.memory_ns) if self.value else 0.0


@dataclass(slots=True)
class _Watched:
    max_batch_tokens: int
    longest_ns: _Fading
    ns_per_token: _Fading
    heard_ns: int
    moved_ns: int  # when the step counter moved last, or something was given to an idle worker
    step: int = -1  # not heard yet
    computed_tokens: int = 0
    computed_step: int = 0
    computed_ns: int = 0
    load: Load | None = None
    sent_tokens: int = 0  # since the last load report
    sent_count: int = 0
    is_stalled: bool = False

    @property
    def is_busy(self) -> bool:
        return bool(self.sent_count or (self.load and (self.load.running_count or self.load.waiting_count)))

    @property
    def queued_tokens(self) -> int:
        """That the next step may compute."""
        waiting = self.load.waiting_prefill_tokens if self.load else 0
        return min(waiting + self.sent_tokens, _STEP_TOKENS_FACTOR * self.max_batch_tokens)


class StallWatch:
    """Owner of what is known about progress. Unknown workers are ignored everywhere."""

    def __init__(self, rule: StallRule) -> None:
        self._rule = rule
        self._workers: dict[WorkerId, _Watched] = {}
        self._checked_ns: int | None = None

    def joined(self, worker_id: WorkerId, max_batch_tokens: int, now_ns: int) -> None:
        """A new life; nothing of an earlier one counts."""
        memory_ns = self._rule.memory_s * _S
        self._workers[worker_id] = _Watched(max_batch_tokens, _Fading(memory_ns), _Fading(memory_ns), heard_ns=now_ns, moved_ns=now_ns)

    def left(self, worker_id: WorkerId) -> None:
        self._workers.pop(worker_id, None)

    def is_stalled(self, worker_id: WorkerId) -> bool:
        worker = self._workers.get(worker_id)
        return worker is not None and worker.is_stalled

    def note_sent(self, worker_id: WorkerId, token_count: int, now_ns: int) -> None:
        """A request of so many tokens is on its way there."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return
        if not worker.is_busy:
            worker.moved_ns = worker.computed_ns = now_ns
        worker.sent_count += 1
        worker.sent_tokens += token_count

    def note_step(self, worker_id: WorkerId, step: int, now_ns: int) -> None:
        """It answered something, as of this step."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return
        worker.heard_ns = now_ns
        if step <= worker.step:
            return
        if worker.step >= 0 and worker.is_busy:
            seen_ns = (now_ns - worker.moved_ns) / (step - worker.step)
            # What was taken for a stall counts in part: if it was a long step after all, the next alarm comes later.
            worker.longest_ns.note(min(seen_ns, self._allowed_ns(worker, now_ns)), now_ns)
        worker.step, worker.moved_ns = step, now_ns

    def note_load(self, worker_id: WorkerId, load: Load, now_ns: int) -> None:
        self.note_step(worker_id, load.step, now_ns)
        worker = self._workers.get(worker_id)
        if worker is None:
            return
        computed, steps = load.computed_tokens_total - worker.computed_tokens, load.step - worker.computed_step
        if worker.is_busy and worker.load is not None and steps > 0 and computed >= _PACE_FROM_TOKENS * steps and not worker.is_stalled:
            worker.ns_per_token.note((now_ns - worker.computed_ns) / computed, now_ns)
        if steps > 0 or not worker.is_busy:
            worker.computed_tokens, worker.computed_step, worker.computed_ns = load.computed_tokens_total, load.step, now_ns
        worker.load = load
        worker.sent_count = worker.sent_tokens = 0
        if not worker.is_busy:
            worker.moved_ns = now_ns

    def check(self, now_ns: int) -> list[Stalled | Recovered]:
        """What has changed; to be called every `interval_s`."""
        late_ns = 0 if self._checked_ns is None else now_ns - self._checked_ns - int(2 * self._rule.interval_s * _S)
        self._checked_ns = now_ns
        changes: list[Stalled | Recovered] = []
        for worker_id, worker in self._workers.items():
            if late_ns > 0:
                worker.heard_ns = min(now_ns, worker.heard_ns + late_ns)
                worker.moved_ns = min(now_ns, worker.moved_ns + late_ns)
            reason = self._why_stalled(worker, now_ns)
            if reason is not None and not worker.is_stalled:
                changes.append(Stalled(worker_id, reason))
            elif reason is None and worker.is_stalled:
                changes.append(Recovered(worker_id))
            worker.is_stalled = reason is not None
        return changes

    def allowed_ns(self, worker_id: WorkerId, now_ns: int) -> int:
        """How long this worker may stand still. Raises: KeyError if it is unknown."""
        return self._allowed_ns(self._workers[worker_id], now_ns)

    def _allowed_ns(self, worker: _Watched, now_ns: int) -> int:
        rule = self._rule
        longest_ns, ns_per_token = worker.longest_ns.now(now_ns), worker.ns_per_token.now(now_ns)
        if not longest_ns or (worker.queued_tokens > _PACE_FROM_TOKENS and not ns_per_token):
            return int(rule.unknown_s * _S)
        expected_ns = longest_ns + ns_per_token * worker.queued_tokens
        return int(max(rule.factor * expected_ns, rule.least_s * _S))

    def _why_stalled(self, worker: _Watched, now_ns: int) -> str | None:
        if worker.load is not None and worker.load.outage:
            return worker.load.outage
        silent_ns, still_ns = now_ns - worker.heard_ns, now_ns - worker.moved_ns
        if silent_ns >= self._rule.silence_s * _S:
            return f"not heard of for {silent_ns / _S:.1f} s"
        if worker.is_busy and still_ns >= self._allowed_ns(worker, now_ns):
            count = worker.load.running_count + worker.load.waiting_count if worker.load else worker.sent_count
            return f"still at step {worker.step} after {still_ns / _S:.1f} s, with {max(count, worker.sent_count)} requests there"
        return None
