"""Many steps at once, for a simulation: steps in which every sequence gets one token more, and nothing else happens.

    step      1      2      3     ...    k            steady: the same rows, each a token further; no block filled before step k,
    row a     t40    t41    t42   ...    t39+k        nobody ended before step k, nobody admitted or preempted
    row b     t7     t8     t9    ...    t6+k

The steps before the last are skipped by counting; the last one is finished as any other, so that whatever comes of it is decided in
one place only. A test holds runs with and without leaps against each other.
"""

from __future__ import annotations

from polyphase.engines.batching.scheduler import StepPlan


def steady_step_count(plan: StepPlan, block_size: int) -> int:
    """Steps, that of `plan` included, of which only the last can bring more than a token for each row; 1 if this one may. At least 1."""
    if plan.admitted or plan.preempted or plan.pulls or plan.is_empty:
        return 1
    count: int | None = None
    for row in plan.rows:
        sequence = row.sequence
        if row.count != 1 or sequence.stats is not None or sequence.is_cancelled or not sequence.stop.is_by_length:
            return 1
        known_count = len(sequence.token_ids)
        until_full = block_size - row.start % block_size
        until_end = sequence.stop.room(known_count, known_count - sequence.request.prompt_token_count)
        least = until_full if until_full < until_end else until_end
        if count is None or least < count:
            count = least
    return count or 1


def leap(plan: StepPlan, step_count: int) -> None:
    """Move the plan and its sequences `step_count` steps on. Tokens that nobody will read are zeros."""
    unread = bytes(step_count)
    for row in plan.rows:
        sequence = row.sequence
        sequence.token_ids.extend(unread)
        sequence.computed_count += step_count
        row.start += step_count
