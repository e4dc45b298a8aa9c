"""What a set of workers is short of: served all the same, but not as it was meant."""

from __future__ import annotations

from collections.abc import Iterable

from polyphase.router.types import WorkerFacts
from polyphase.wire.cards import BLOCKS, Role


def shortcomings(roles: Iterable[Role]) -> list[str]:
    """Sentences for a person.

    Args:
        roles: of one model's workers that can be given requests; those that drain or stand still do not count.
    """
    present = set(roles)
    if present == {Role.PREFILL}:
        return ["no decode worker is there: prefill workers serve requests whole, if their engine can"]
    if present == {Role.DECODE}:
        return ["no prefill worker is there: decode workers compute prompts themselves, if their engine can"]
    return []


def can_serve(workers: Iterable[WorkerFacts]) -> bool:
    """Whether these, of one model and able to take requests, serve any from its beginning to its end."""
    present = list(workers)
    return any(facts.serves_whole for facts in present) or {Role.PREFILL, Role.DECODE} <= {facts.role for facts in present}


def misfits(workers: Iterable[WorkerFacts]) -> list[str]:
    """Prefill workers of one model that cannot hand over, or not to each worker that decodes, and why: a sentence for each pair."""
    present = sorted(workers, key=lambda facts: facts.worker_id)
    takers = [facts for facts in present if facts.role is not Role.PREFILL]
    found: list[str] = []
    for giver in present:
        if giver.role is not Role.PREFILL or not takers:
            continue
        if not giver.can_hand_over:
            found.append(f"{giver.worker_id} cannot hand its KV over: decode workers compute prompts themselves")
            continue
        found += [
            f"{giver.worker_id} cannot hand over to {taker.worker_id}: {_difference(giver, taker)}"
            for taker in takers
            if taker.offer_kind != giver.offer_kind
        ]
    return found


def _difference(giver: WorkerFacts, taker: WorkerFacts) -> str:
    mine, theirs = giver.offer_facts, taker.offer_facts
    differing = [name for name in mine if name in theirs and mine[name] != theirs[name]]
    if differing:
        return "; ".join(f"{name} is {mine[name]} at the one and {theirs[name]} at the other" for name in differing)
    return f"the one hands over {_kind(giver.offer_kind)}, the other takes {_kind(taker.offer_kind)}"


def _kind(offer_kind: str) -> str:
    return {BLOCKS: "blocks of our own", "": "nothing"}.get(offer_kind, offer_kind.partition("/")[0])
