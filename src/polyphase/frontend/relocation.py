"""Which sequences should go on elsewhere although their worker is well: because it drains, or is for something else now.

    worker                     at once              when `patience` is over   only if another can take it:
    role prefill, no longer    decoding sequences                             one that decodes
    role decode, no longer     prompts not begun                              another prefill worker
    draining                                        everything                anybody
    falling asleep             everything                                     anybody

What is left alone goes on where it is: a worker computes whatever it was given, whatever its role is now.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from polyphase.core.ids import Epoch, WorkerId
from polyphase.frontend.flight import Stage
from polyphase.router import WorkerFacts
from polyphase.wire.cards import Role


def has_another(facts: WorkerFacts, fleet: Collection[WorkerFacts]) -> bool:
    """Whether any other worker could go on with this one's sequences."""
    return any(_can_take_over(other, facts) for other in fleet)


def misplaced_stages(facts: WorkerFacts, fleet: Collection[WorkerFacts], *, is_patience_over: bool) -> frozenset[Stage]:
    """Stages in which a sequence at this worker should be asked for. `is_patience_over`: since it began to drain."""
    others = [other for other in fleet if _can_take_over(other, facts)]
    if facts.is_asleep and others:
        return frozenset({Stage.PREFILL, Stage.SERVING})
    if facts.is_draining:
        return frozenset({Stage.PREFILL, Stage.SERVING}) if others and is_patience_over else frozenset()
    if facts.role is Role.PREFILL and any(other.role is not Role.PREFILL for other in others):
        return frozenset({Stage.SERVING})
    if facts.role is Role.DECODE and any(other.role is Role.PREFILL and other.can_hand_over for other in others):
        return frozenset({Stage.PREFILL})
    return frozenset()


def _can_take_over(other: WorkerFacts, facts: WorkerFacts) -> bool:
    is_another = other.worker_id != facts.worker_id and other.model == facts.model
    return is_another and other.is_available


class Relocation:
    """Remembers since when workers drain."""

    def __init__(self, patience_s: float) -> None:
        self._patience_ns = int(patience_s * 1e9)
        self._draining_since_ns: dict[tuple[WorkerId, Epoch], int] = {}

    def review(self, fleet: Collection[WorkerFacts], now_ns: int) -> Iterator[tuple[WorkerFacts, frozenset[Stage]]]:
        """Workers with something to be moved; to be asked after each change, and now and then."""
        since = self._draining_since_ns
        self._draining_since_ns = {
            (facts.worker_id, facts.epoch): since.get((facts.worker_id, facts.epoch), now_ns) for facts in fleet if facts.is_draining
        }
        for facts in fleet:
            began_ns = self._draining_since_ns.get((facts.worker_id, facts.epoch), now_ns)
            stages = misplaced_stages(facts, fleet, is_patience_over=now_ns - began_ns >= self._patience_ns)
            if stages:
                yield facts, stages
