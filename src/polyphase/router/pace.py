"""How fast workers compute prompts and blocks travel between them, learnt from what they report of each request.

    first token of a prompt computed there      ms per token, by worker
    blocks pulled from another worker           ms per token, by pair of workers
    first token after a hand-over               what the hand-over took besides: messages, and a step
    blocks pulled from another worker's cache   ms per token, by pair: all of it was waited for, while a hand-over's are mostly there

A pair or a worker that nothing is known of is taken to be like the others. What is known of pulls is forgotten after a minute, so that
a way that did not pay is tried again. Values in, values out; no clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from polyphase.core.ids import WorkerId

WEIGHT = 0.2  # of the newest figure in a mean
PULL_MEMORY_NS = 60 * 10**9
VAIN_PULLS = 3  # a single one may be a name that had just become wrong
LEAST_TOKENS = 64  # fewer say more of the step around them than of their own cost


@dataclass(slots=True)
class Mean:
    """Of the latest figures; None before the first."""

    value: float | None = None

    def note(self, figure: float) -> None:
        self.value = figure if self.value is None else self.value + WEIGHT * (figure - self.value)


@dataclass(slots=True)
class _FreshMean(Mean):
    """Of figures that came within a minute of each other, without the first of them: that one holds the meeting of the two agents."""

    noted_ns: int | None = None

    def _is_fresh(self, now_ns: int) -> bool:
        return self.noted_ns is not None and now_ns - self.noted_ns < PULL_MEMORY_NS

    def at(self, now_ns: int) -> float | None:
        return self.value if self._is_fresh(now_ns) else None

    def note_at(self, figure: float, now_ns: int) -> None:
        if self._is_fresh(now_ns):
            self.note(figure)
        else:
            self.value = None
        self.noted_ns = now_ns


@dataclass(slots=True)
class Paces:
    _prefill: dict[WorkerId, Mean] = field(default_factory=dict)
    _any_prefill: Mean = field(default_factory=Mean)
    _transfer: dict[tuple[WorkerId, WorkerId], Mean] = field(default_factory=dict)
    _any_transfer: Mean = field(default_factory=Mean)
    _hand_over: Mean = field(default_factory=Mean)
    _pull: dict[tuple[WorkerId, WorkerId], _FreshMean] = field(default_factory=dict)
    _vain: dict[tuple[WorkerId, WorkerId], tuple[int, int]] = field(default_factory=dict)  # how often in a row, and when last
    _any_pull: _FreshMean = field(default_factory=_FreshMean)

    def note_prefill(self, worker_id: WorkerId, token_count: int, duration_ms: float) -> None:
        """So many tokens were computed in this time, from leaving the worker's queue to the first token's arrival."""
        if token_count >= LEAST_TOKENS and duration_ms > 0:
            self._prefill.setdefault(worker_id, Mean()).note(duration_ms / token_count)
            self._any_prefill.note(duration_ms / token_count)

    def note_transfer(self, source: WorkerId, target: WorkerId, token_count: int, transfer_ms: float, rest_ms: float) -> None:
        """`rest_ms`: from the hand-over to the next token's arrival, without the transfer and the time in the queue."""
        if token_count >= LEAST_TOKENS:
            self._transfer.setdefault((source, target), Mean()).note(transfer_ms / token_count)
            self._any_transfer.note(transfer_ms / token_count)
            self._hand_over.note(max(rest_ms, 0.0))

    def note_pull(self, source: WorkerId, target: WorkerId, token_count: int, duration_ms: float, now_ns: int) -> None:
        """`duration_ms`: that the request waited for it, the question included; without tokens, in vain. `now_ns`: of any clock."""
        pair = (source, target)
        if token_count:
            self._vain.pop(pair, None)
        else:
            self._vain[pair] = (self._vain.get(pair, (0, 0))[0] + 1, now_ns)
        if token_count >= LEAST_TOKENS:
            mean = self._pull.setdefault(pair, _FreshMean())
            mean.note_at(duration_ms / token_count, now_ns)
            if mean.value is not None:
                self._any_pull.note_at(duration_ms / token_count, now_ns)

    def drop_worker(self, worker_id: WorkerId) -> None:
        """Its next life may run on something else."""
        self._prefill.pop(worker_id, None)
        self._transfer = {pair: mean for pair, mean in self._transfer.items() if worker_id not in pair}
        self._vain = {pair: vain for pair, vain in self._vain.items() if worker_id not in pair}
        self._pull = {pair: mean for pair, mean in self._pull.items() if worker_id not in pair}

    def prefill_ms_per_token(self, worker_id: WorkerId) -> float | None:
        mean = self._prefill.get(worker_id)
        return self._any_prefill.value if mean is None else mean.value

    def transfer_ms_per_token(self, source: WorkerId, target: WorkerId) -> float | None:
        mean = self._transfer.get((source, target))
        return self._any_transfer.value if mean is None else mean.value

    def pull_ms_per_token(self, source: WorkerId, target: WorkerId, now_ns: int) -> float | None:
        mean = self._pull.get((source, target))
        known = None if mean is None else mean.at(now_ns)
        return self._any_pull.at(now_ns) if known is None else known

    def is_pull_in_vain(self, source: WorkerId, target: WorkerId, now_ns: int) -> bool:
        """Nothing came several times in a row, the last time within a minute: their blocks are of different kinds, or there is no way."""
        count, noted_ns = self._vain.get((source, target), (0, 0))
        return count >= VAIN_PULLS and now_ns - noted_ns < PULL_MEMORY_NS

    @property
    def hand_over_ms(self) -> float | None:
        return self._hand_over.value
