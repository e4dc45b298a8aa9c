"""The workers among which a decision is made, as columns: one row is one worker, and a scorer goes over a column at a time.

    worker_ids    w0     w1     w2   ..      kept from one decision to the next; the router notes what changed,
    views         ...    ...    ...          a worker at a time
    load_tokens   310.   0.     4096.
    room_tokens   8000   16000  0
    overlaps      60     0      12           of one request

With hundreds of workers a decision touches a few numbers of each; an object for each, made anew each time, would cost ten times as much.
As a sequence a `Lineup` gives a `WorkerView` per row, for scorers that look at one worker after the other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Protocol, overload

from polyphase.core.ids import WorkerId
from polyphase.router.cost import load_and_room_tokens, queued_prefill_tokens, used_block_count
from polyphase.router.indexes.naive import NaiveOverlaps
from polyphase.router.saturation import is_saturated
from polyphase.router.types import Candidate, Leg, Overlaps, RouteRequest, WorkerView
from polyphase.wire.events import Tier


class Standings:
    """How some workers of one model, so of one block size, stand, whatever the request. Rows keep their places; `note` changes one."""

    __slots__ = (
        "block_size",
        "full_rows",
        "least_room_tokens",
        "load_tokens",
        "max_waiting_requests",
        "room_tokens",
        "rows",
        "saturated_rows",
        "views",
        "worker_ids",
    )

    def __init__(self, views: Iterable[WorkerView], max_waiting_requests: int) -> None:
        self.views = list(views)
        self.max_waiting_requests = max_waiting_requests
        self.worker_ids: tuple[WorkerId, ...] = tuple(view.facts.worker_id for view in self.views)
        self.rows = {worker_id: row for row, worker_id in enumerate(self.worker_ids)}
        self.block_size = self.views[0].facts.block_size if self.views else 1
        figures = [load_and_room_tokens(view) for view in self.views]
        self.load_tokens = [load for load, _ in figures]
        self.room_tokens = [room for _, room in figures]
        self.least_room_tokens = min(self.room_tokens, default=0)
        self.full_rows = {row for row, view in enumerate(self.views) if self._is_full(view)}
        self.saturated_rows = {row for row, view in enumerate(self.views) if is_saturated(view)}

    def __len__(self) -> int:
        return len(self.views)

    def note(self, view: WorkerView) -> None:
        """This worker stands like this now. One that has no row here is none of ours."""
        row = self.rows.get(view.facts.worker_id)
        if row is None:
            return
        self.views[row] = view
        room_before = self.room_tokens[row]
        self.load_tokens[row], room = load_and_room_tokens(view)
        self.room_tokens[row] = room
        if room < self.least_room_tokens:
            self.least_room_tokens = room
        elif room_before == self.least_room_tokens:
            self.least_room_tokens = min(self.room_tokens)
        if self._is_full(view):
            self.full_rows.add(row)
        elif row in self.full_rows:
            self.full_rows.remove(row)
        if is_saturated(view):
            self.saturated_rows.add(row)
        elif row in self.saturated_rows:
            self.saturated_rows.remove(row)

    def without(self, rows: Collection[int]) -> Standings:
        return Standings((view for row, view in enumerate(self.views) if row not in rows), self.max_waiting_requests)

    def with_room(self) -> Standings:
        """Leaves out workers whose queue is full."""
        return self.without(self.full_rows) if self.full_rows else self

    @property
    def has_headroom(self) -> bool:
        """Whether a worker is here that is not saturated."""
        return len(self.saturated_rows) < len(self.views)

    def _is_full(self, view: WorkerView) -> bool:
        return view.booked_request_count >= view.facts.max_running + self.max_waiting_requests


class Lineup(Sequence[WorkerView]):
    """Workers for one leg of one request. Valid until the router changes something: whoever keeps it copies the columns."""

    __slots__ = ("overlaps", "standings")

    def __init__(self, standings: Standings, overlaps: Overlaps) -> None:
        self.standings = standings
        self.overlaps = overlaps

    @classmethod
    def of_views(cls, views: Sequence[WorkerView]) -> Lineup:
        """For scorers outside a router: as the views say."""
        depths = {view.facts.worker_id: view.overlap_block_count for view in views}
        return cls(Standings(views, max_waiting_requests=0), NaiveOverlaps(dict.fromkeys(Tier, depths)))

    @property
    def worker_ids(self) -> Sequence[WorkerId]:
        return self.standings.worker_ids

    def overlap_block_counts(self, tier: Tier = Tier.DEVICE) -> list[int]:
        """Leading blocks that each worker holds in this tier or a faster one."""
        return self.overlaps.depths(self.standings.worker_ids, tier)

    def tokens_beyond(self, token_count: int, at_least: int = 0) -> list[int]:
        """Of a prompt of so many tokens, those that each worker would have to compute."""
        return self.overlaps.tokens_beyond(self.standings.worker_ids, self.standings.block_size, token_count, at_least)

    def __len__(self) -> int:
        return len(self.standings)

    @overload
    def __getitem__(self, row: int) -> WorkerView: ...
    @overload
    def __getitem__(self, row: slice) -> list[WorkerView]: ...
    def __getitem__(self, row: int | slice) -> WorkerView | list[WorkerView]:
        if isinstance(row, slice):
            return [self[one] for one in range(len(self))[row]]
        view = self.standings.views[row]
        return view.with_overlap(self.overlaps.depth(view.facts.worker_id))

    def __iter__(self) -> Iterator[WorkerView]:
        return map(WorkerView.with_overlap, self.standings.views, self.overlap_block_counts())


class Candidates(Sequence[Candidate]):
    """All workers of a decision, best first, as they stood before it; put in order only when somebody asks."""

    __slots__ = ("_found", "_overlaps", "_picked", "_scores", "_views")

    def __init__(self, lineup: Lineup, scores: Sequence[float], picked: int) -> None:
        self._views = lineup.standings.views.copy()
        self._overlaps = lineup.overlaps
        self._scores = scores
        self._picked = picked
        self._found: tuple[Candidate, ...] | None = None

    def __len__(self) -> int:
        return len(self._views)

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
            order = sorted(range(len(scores)), key=lambda row: (-scores[row], row != picked, row))
            self._found = tuple(_candidate(self._views[row], self._overlaps, scores[row]) for row in order)
        return self._found


class Scorer(Protocol):
    """One reason to prefer a worker. Scores are in [0, 1], higher is better, comparable within one call only."""

    @property
    def name(self) -> str: ...

    def score(self, request: RouteRequest, leg: Leg, workers: Lineup) -> Sequence[float]: ...


class Picker(Protocol):
    """Chooses among scored workers. `turn` counts the router's decisions: the source of anything like a tie-break."""

    def pick(self, scores: Sequence[float], workers: Lineup, turn: int) -> int: ...


def _candidate(view: WorkerView, overlaps: Overlaps, score: float) -> Candidate:
    return Candidate(
        worker_id=view.facts.worker_id,
        score=score,
        overlap_block_count=overlaps.depth(view.facts.worker_id),
        booked_prefill_tokens=view.booked_prefill_tokens,
        booked_block_count=view.booked_block_count,
        booked_request_count=view.booked_request_count,
        queued_prefill_tokens=queued_prefill_tokens(view),
        used_block_count=used_block_count(view),
    )
