"""Which tokens of which sequences are computed in the next step. Decides from counts; knows no tensor and no clock.

A step has a budget of tokens. Sequences that decode get one token each, first of all; what is left goes to prompts in order of
(priority, arrival), in chunks if they do not fit. While nobody decodes, nobody waits for the step's end either, and the budget may be
larger. A sequence is admitted when there are blocks for all its known tokens, so only decoding makes it grow; when blocks run out then, the
sequence that is last in order gives up all of its own and starts again later, mostly from the prefix cache. The first in order is never
given up for another, so there is always one that gets on.

A sequence most of whose work another one is doing just now, because their prompts begin alike, waits for the next step and finds it in
the cache then. So a burst under one system prompt computes it once. For that do others overtake it, and while its grammar is prepared.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from polyphase.core.errors import KvError, Overloaded
from polyphase.engines.batching.coasting import Coasting, steps_until_due
from polyphase.engines.batching.sequence import Sequence
from polyphase.kv import PrefixCache


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_batch_tokens: int
    max_running: int
    max_waiting: int
    max_prefill_batch_tokens: int | None = None  # of a step in which nobody decodes; None: the same
    longest_step_ms: float | None = None  # prompts are read in chunks that take about this long at most; None: however long


@dataclass(slots=True, eq=False)  # not frozen: one is made for each token of each answer, and that would take twice as long
class Row:
    """Tokens `start` to `start + count` of a sequence, to be computed. `is_sampled`: the last one's logits give the next token."""

    sequence: Sequence
    start: int
    count: int

    @property
    def is_sampled(self) -> bool:
        return self.start + self.count == len(self.sequence.token_ids)


@dataclass(frozen=True, slots=True)
class Pull:
    """Blocks `first_block` and later of a sequence, up to `token_count` tokens, are read from the offer that came with it."""

    sequence: Sequence
    first_block: int
    token_count: int


@dataclass(slots=True)
class StepPlan:
    """What the next step does. Rows of pulled sequences count on the pull: if it fails, the row is left out.

    `is_interrupted` may become true while the step is performed: then nobody wants most of it, and it should end as soon as it can, with
    no row computed.
    """

    rows: list[Row] = field(default_factory=list)
    coasting_count: int = 0  # sequences that get a token besides, without a row
    pulls: list[Pull] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    is_interrupted: bool = False

    @property
    def is_empty(self) -> bool:
        return not self.rows and not self.coasting_count

    def interrupt_if_pointless(self) -> None:
        """To be called when a sequence is cancelled: others compute their few tokens anew rather than wait for many that nobody wants."""
        unwanted_count = sum(row.count for row in self.rows if row.sequence.is_cancelled)
        self.is_interrupted = 2 * unwanted_count >= sum(row.count for row in self.rows)


class Scheduler:
    """Owner: a sequence that was added is removed exactly once; its blocks are the scheduler's from admission until then."""

    def __init__(self, limits: SchedulerLimits, cache: PrefixCache) -> None:
        self._limits = limits
        self._cache = cache
        # Every running sequence gets at least one token of each step, so that none of them starves.
        self._max_running = min(limits.max_running, limits.max_batch_tokens)
        self._waiting: list[Sequence] = []  # both in order of rank
        self._running: list[Sequence] = []  # but for those that coast
        self.coasting = Coasting()

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Without those that coast."""
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        return tuple(self._waiting)

    @property
    def running_count(self) -> int:
        return len(self._running) + len(self.coasting)

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    @property
    def uncomputed_prefill_tokens(self) -> int:
        """Of waiting sequences, but for what they would find in the cache by now, and of running ones that do not decode yet."""
        waiting = sum(self._cache.uncached_count(s.blocks, len(s.token_ids)) for s in self._waiting)
        return waiting + sum(s.uncomputed_count for s in self._running if s.uncomputed_count > 1)

    def refuse_if_full(self, request_id: str) -> None:
        """Raises: Overloaded if too many wait already."""
        if len(self._waiting) >= self._limits.max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests wait for this worker already, which is its limit", request_id=request_id)

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait for its turn."""
        self._wait(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that ended and free its blocks."""
        is_coasting = self.coasting.wake(sequence)
        if not is_coasting and not self._take(self._waiting, sequence) and not self._take(self._running, sequence):
            raise KvError(f"request {sequence.request.request_id} is not scheduled, so it cannot be removed")
        self._cache.close(sequence.blocks)

    def plan(self, prefill_limit: int | None = None) -> StepPlan:
        """Decide the next step, and take the blocks that it writes to. Cost: linear in the running sequences and the admitted tokens.

        Args:
            prefill_limit: tokens of prompts that this step may hold at most, on top of the limits that always hold.
        """
        if self.coasting and self._cache.pool.available_count < len(self._running):
            self._wake(self.coasting.wake_all())  # some may have to give up their blocks for others
        plan = StepPlan(coasting_count=len(self.coasting))
        prefilling: list[Sequence] = []
        rows, block_size = plan.rows, self._cache.block_size
        for sequence in self.running:
            known, computed = len(sequence.token_ids), sequence.computed_count
            if known - computed > 1:
                prefilling.append(sequence)
            elif plan.preempted and sequence in plan.preempted:
                continue
            elif known <= block_size * len(sequence.blocks.block_ids) or self._make_room(sequence, plan):
                rows.append(Row(sequence, computed, 1))
        budget = self._limits.max_batch_tokens - len(rows) - plan.coasting_count
        if not rows and not plan.coasting_count:
            budget = self._limits.max_prefill_batch_tokens or budget
        if prefill_limit is not None:
            budget = min(budget, prefill_limit)
        for sequence in prefilling:
            if budget and sequence not in plan.preempted:
                budget -= self._plan_prefill(sequence, plan, budget)
        place = 0
        while budget and place < len(self._waiting) and not plan.preempted and self.running_count < self._max_running:
            sequence = self._waiting[place]
            if sequence.preparation is not None or (prefilling and self._is_in_the_making(sequence, prefilling)):
                place += 1
                continue
            if not self._admit(place, plan):
                break  # nobody overtakes: otherwise a long prompt might wait for ever
            budget -= self._plan_prefill(sequence, plan, budget)
            prefilling.append(sequence)
        return plan

    def _is_in_the_making(self, sequence: Sequence, prefilling: list[Sequence]) -> bool:
        """Whether at least half of what it would have to compute is being computed for another one in this step or the next ones."""
        if sequence.offer is not None:
            return False
        known = len(sequence.token_ids)
        uncached = self._cache.uncached_count(sequence.blocks, known)
        wanted = -(-uncached // (2 * self._cache.block_size))
        return any(
            self._cache.shared_beyond(sequence.blocks, known - uncached, other.blocks, len(other.token_ids)) >= wanted
            for other in prefilling
            if other.blocks.block_ids  # it may have been preempted
        )

    def _plan_prefill(self, sequence: Sequence, plan: StepPlan, budget: int) -> int:
        start = sequence.computed_count
        if plan.pulls and plan.pulls[-1].sequence is sequence:
            start = plan.pulls[-1].token_count
        count = min(len(sequence.token_ids) - start, budget)
        plan.rows.append(Row(sequence, start, count))
        return count

    def _admit(self, place: int, plan: StepPlan) -> bool:
        """Move a waiting sequence to the running ones, unless blocks are short. Each running one may soon want another block."""
        sequence = self._waiting[place]
        known = len(sequence.token_ids)
        hit_count = self._cache.admit(sequence.blocks, known, spare_count=self.running_count)
        if hit_count is None:
            return False
        del self._waiting[place]
        insort(self._running, sequence, key=_rank)
        sequence.computed_count = hit_count
        plan.admitted.append(sequence)
        if sequence.offer is not None:
            pulled_count = min(sequence.offer.token_count, known - 1)
            if pulled_count > hit_count:
                plan.pulls.append(Pull(sequence, hit_count // self._cache.block_size, pulled_count))
        return True

    def _make_room(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Give a decoding sequence the block for its next token, preempting from the end. False if it was itself the last."""
        while not self._cache.grow(sequence.blocks, len(sequence.token_ids)):
            victim = self._running.pop()
            self._cache.close(victim.blocks)
            victim.computed_count = 0
            plan.preempted.append(victim)
            self._wait(victim)
            if victim is sequence:
                return False
        return True

    def let_coast(self, plan: StepPlan) -> None:
        """Take from the plan those rows of decoding sequences that need not be looked at, this step included."""
        kept: list[Row] = []
        for row in plan.rows:
            sequence = row.sequence
            is_decoding = row.count == 1 and row.is_sampled
            until_due = steps_until_due(sequence, self._cache.block_size) if is_decoding else None
            if until_due is None:
                kept.append(row)
            else:
                self._take(self._running, sequence)
                self.coasting.join(sequence, until_due)
        plan.rows = kept
        plan.coasting_count = len(self.coasting)

    def wake_due(self) -> list[Row]:
        """Rows of the coasting sequences to which something happens in the step under way."""
        woken = self.coasting.wake_due()
        self._wake(woken)
        return [Row(sequence, sequence.computed_count, 1) for sequence in woken]

    def _wake(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            insort(self._running, sequence, key=_rank)

    def _wait(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=_rank)

    @staticmethod
    def _take(queue: list[Sequence], sequence: Sequence) -> bool:
        index = bisect_left(queue, _rank(sequence), key=_rank)
        if index == len(queue) or queue[index] is not sequence:
            return False
        del queue[index]
        return True


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
