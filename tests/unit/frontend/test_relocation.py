"""What is moved away from a worker that is well, and when."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polyphase.core.ids import Epoch, WorkerId
from polyphase.frontend.flight import Stage
from polyphase.frontend.relocation import Relocation, has_another, misplaced_stages
from polyphase.router import WorkerFacts, shortcomings
from polyphase.wire.cards import Role

ALL = {Stage.PREFILL, Stage.SERVING}
S = 1_000_000_000


def worker(name: str, role: Role, **changes: object) -> WorkerFacts:
    facts = WorkerFacts(WorkerId(name), Epoch(1), "m", role, 16, 64, 512, 8, can_hand_over=True)
    return replace(facts, **changes)  # type: ignore[arg-type]


PREFILL, DECODE, BOTH = worker("p", Role.PREFILL), worker("d", Role.DECODE), worker("b", Role.BOTH)


@pytest.mark.parametrize(
    ("facts", "others", "expected"),
    [
        (PREFILL, [DECODE], {Stage.SERVING}),
        (PREFILL, [BOTH], {Stage.SERVING}),
        (PREFILL, [worker("q", Role.PREFILL)], set()),  # nobody decodes: it is served here
        (PREFILL, [replace(DECODE, is_stalled=True)], set()),
        (PREFILL, [replace(DECODE, is_draining=True)], set()),
        (PREFILL, [replace(DECODE, model="another")], set()),
        (PREFILL, [], set()),
        (DECODE, [PREFILL], {Stage.PREFILL}),
        (DECODE, [replace(PREFILL, can_hand_over=False)], set()),
        (DECODE, [BOTH], set()),
        (BOTH, [PREFILL, DECODE], set()),
        (replace(DECODE, is_asleep=True), [worker("d2", Role.DECODE)], ALL),
        (replace(DECODE, is_asleep=True), [replace(BOTH, is_asleep=True)], set()),
    ],
)
def test_what_a_role_is_not_for_leaves_when_somebody_else_is(facts: WorkerFacts, others: list[WorkerFacts], expected: set[Stage]) -> None:
    assert misplaced_stages(facts, [facts, *others], is_patience_over=False) == expected


def test_a_draining_worker_is_left_alone_for_a_while_and_for_good_if_it_is_the_only_one() -> None:
    relocation = Relocation(patience_s=2)
    draining = replace(DECODE, is_draining=True)
    other = worker("d2", Role.DECODE)
    assert list(relocation.review([DECODE, other], 0)) == []
    assert list(relocation.review([draining, other], 10 * S)) == []
    assert list(relocation.review([draining, other], 11 * S)) == []
    assert list(relocation.review([draining, other], 12 * S)) == [(draining, ALL)]
    assert list(relocation.review([draining], 13 * S)) == []
    assert list(relocation.review([draining, PREFILL], 14 * S)) == [(draining, ALL)]  # it steps in
    again = replace(draining, epoch=Epoch(2))
    assert list(relocation.review([again, other], 20 * S)) == []


def test_has_another() -> None:
    assert has_another(DECODE, [DECODE, PREFILL])
    assert not has_another(DECODE, [DECODE])
    assert not has_another(DECODE, [DECODE, replace(PREFILL, is_stalled=True)])


def test_what_a_fleet_is_short_of() -> None:
    assert shortcomings([]) == []
    assert shortcomings([Role.PREFILL, Role.DECODE]) == shortcomings([Role.BOTH]) == shortcomings([Role.BOTH, Role.PREFILL]) == []
    assert "no decode worker" in shortcomings([Role.PREFILL, Role.PREFILL])[0]
    assert "no prefill worker" in shortcomings([Role.DECODE])[0]
