"""Groups of workers of one model: those between which KV goes, and those that share a weight."""

from __future__ import annotations

from collections.abc import Iterable

from polyphase.router.types import WorkerFacts

Mates = tuple[str, str, int, frozenset[str], str]  # group, engine, block size, adapters, kind of offers


def mates_of(facts: WorkerFacts) -> Mates:
    """KV goes only between workers that agree in all of this."""
    return facts.group, facts.engine, facts.block_size, facts.adapters, facts.offer_kind


def group_weights(workers: Iterable[WorkerFacts]) -> dict[str, float]:
    """By group of one model: the greatest weight that a worker of it states, 1 where none does. None at all where no group has one."""
    stated: dict[str, float | None] = {}
    for facts in workers:
        before = stated.get(facts.group)
        stated[facts.group] = facts.weight if before is None else max(before, before if facts.weight is None else facts.weight)
    if all(weight is None for weight in stated.values()):
        return {}
    return {group: 1.0 if weight is None else weight for group, weight in stated.items()}
