"""Sequences that get a token in each step, and to which nothing else happens for a while: counted, not looked at. For simulations.

    step          1     2     3    ...   k           a joins before step 1, and is *due* in step k: it fills a block, or ends
    sequence a    t40   t41   t42  ...   t39+k       until then nothing about it changes but its length, which follows from the count

A step's work at a sequence is in vain while nobody reads its tokens; with hundreds of tokens to an answer that is nearly all the work of
a simulated engine. What is due is woken, and goes the way of every other sequence, so that whatever comes of it is decided in one
place only. A test holds runs with and without coasting against each other.
"""

from __future__ import annotations

import heapq

from polyphase.engines.batching.sequence import Sequence


def steps_until_due(sequence: Sequence, block_size: int) -> int | None:
    """In which step from now on, the first being 1, a decoding sequence fills a block or ends; None if that depends on what it says."""
    stop = sequence.stop
    if sequence.stats is not None or sequence.is_cancelled or not stop.is_by_length:
        return None
    until_full = block_size - sequence.computed_count % block_size
    return max(1, min(until_full, stop.end_token_count - len(sequence.token_ids)))


class Coasting:
    """Owner: whoever lets sequences join counts the steps, and wakes those that are due before their step is finished."""

    def __init__(self) -> None:
        self._step = 0  # steps counted
        self._since: dict[Sequence, int] = {}
        self._due: list[tuple[int, tuple[int, int], int, Sequence]] = []  # heap of (step, rank, since, …); some have left since
        self._lengths_at_zero = 0  # what the sum of lengths would have been before the first step

    def __len__(self) -> int:
        return len(self._since)

    @property
    def token_count(self) -> int:
        """Sum of the lengths now: what a step of these sequences reads."""
        return self._lengths_at_zero + len(self._since) * self._step

    @property
    def steps_until_due(self) -> int | None:
        """In which step from now on, the first being 1, somebody is due; None if nobody is there."""
        due = self._due
        while due and self._since.get(due[0][3]) != due[0][2]:
            heapq.heappop(due)
        return due[0][0] - self._step if due else None

    def join(self, sequence: Sequence, until_due: int) -> None:
        self._since[sequence] = self._step
        self._lengths_at_zero += len(sequence.token_ids) - self._step
        heapq.heappush(self._due, (self._step + until_due, sequence.rank, self._step, sequence))

    def count(self, step_count: int) -> None:
        """So many steps are done. In none of them was anybody due."""
        self._step += step_count

    def wake_due(self) -> list[Sequence]:
        """Those that are due in the next step, in order of rank: they leave, as they are before that step."""
        woken: list[Sequence] = []
        while self.steps_until_due == 1:
            sequence = self._due[0][3]
            self.wake(sequence)
            woken.append(sequence)
        return woken

    def wake_all(self) -> list[Sequence]:
        woken = sorted(self._since, key=lambda sequence: sequence.rank)
        for sequence in woken:
            self.wake(sequence)
        return woken

    def wake(self, sequence: Sequence) -> bool:
        """Bring its counts up to date, and let it leave. False if it is not here. Tokens that nobody will read are zeros."""
        since = self._since.pop(sequence, None)
        if since is None:
            return False
        self._lengths_at_zero -= len(sequence.token_ids) - since
        sequence.token_ids.extend(bytes(self._step - since))
        sequence.computed_count += self._step - since
        return True
