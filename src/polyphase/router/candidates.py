"""What is kept of a decision for people who ask why: each worker that might have been chosen, with the figures behind its score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from polyphase.router.cost import queued_prefill_tokens, used_block_count
from polyphase.router.lineup import Lineup
from polyphase.router.policies import Weighing
from polyphase.router.types import Candidate
from polyphase.wire.events import Tier


class Candidates(Sequence[Candidate]):
    """All workers of a decision, best first, as they stood before it; put in order only when somebody asks."""

    __slots__ = ("_columns", "_found", "_lineup", "_parts", "_picked", "_rows", "_scores", "_views")

    def __init__(self, lineup: Lineup, weighing: Weighing, picked: int) -> None:
        self._views = lineup.standings.views.copy()
        # Columns of the standings change with the next decision.
        self._columns = [column[:] for column in weighing.columns]
        self._parts = weighing.parts
        self._scores = weighing.scores
        self._lineup = lineup
        self._rows: Sequence[int] = range(len(self._views)) if lineup.rows is None else lineup.rows
        self._picked = picked
        self._found: tuple[Candidate, ...] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Candidate: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Candidate, ...]: ...
    def __getitem__(self, place: int | slice) -> Candidate | tuple[Candidate, ...]:
        return self._in_order()[place]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._in_order() == tuple(other)

    def __hash__(self) -> int:
        return hash(self._in_order())

    def __repr__(self) -> str:
        return f"Candidates{self._in_order()!r}"

    def _in_order(self) -> tuple[Candidate, ...]:
        if self._found is None:
            scores, picked = self._scores, self._picked
            # The chosen one stands first among equals.
            order = sorted(self._rows, key=lambda row: (-scores[row], row != picked, row))
            self._found = tuple(self._candidate(row) for row in order)
        return self._found

    def _candidate(self, row: int) -> Candidate:
        view = self._views[row]
        return Candidate(
            worker_id=view.facts.worker_id,
            score=self._scores[row],
            overlap_block_count=self._lineup.depth(row),
            booked_prefill_tokens=view.booked_prefill_tokens,
            booked_block_count=view.booked_block_count,
            booked_request_count=view.booked_request_count,
            queued_prefill_tokens=queued_prefill_tokens(view),
            used_block_count=used_block_count(view),
            held_block_count=self._lineup.depth(row, Tier.OBJECT),
            costs=tuple((part.name, part.weight * column[row]) for part, column in zip(self._parts, self._columns, strict=True)),
            block_size=view.facts.block_size,
            group=view.facts.group,
        )
