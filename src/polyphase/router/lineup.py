"""The workers among which a decision is made, as columns: one row is one worker, and a part goes over a column at a time.

    worker_ids      w0     w1     w2   ..      kept from one decision to the next; the router notes what changed,
    views           ...    ...    ...          a worker at a time
    queued_tokens   310.   0.     4096.
    used_tokens     640.   0.     16000.
    overlaps        60     0      12           of one request

With hundreds of workers a decision touches a few numbers of each; an object for each, made anew each time, would cost ten times as much.
As a sequence a `Lineup` gives a `WorkerView` per row, for parts that look at one worker after the other.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import overload

import xxhash

from polyphase.core.ids import Epoch, WorkerId
from polyphase.router.columns import Column
from polyphase.router.cost import in_flight_count, queued_prefill_tokens, used_block_count
from polyphase.router.groups import group_weights, mates_of
from polyphase.router.indexes.naive import NaiveOverlaps
from polyphase.router.saturation import is_saturated
from polyphase.router.types import Leg, Overlaps, WorkerFacts, WorkerView
from polyphase.wire.events import Tier

NOT_EXPECTED: Mapping[WorkerId, int] = {}
_MAX_LABEL_SETS = 64


class Standings:
    """How the workers of one model stand, whatever the request. Rows keep their places; `note` changes one.

    block_size: of all of them; where they differ, the smallest of `block_sizes`.
    mates: groups of workers between which a request may be split, by `mates_of`; one where all are alike.
    least_context: tokens that every worker's context holds; None: no limit is known.
    weights: of the groups, if any has one; `ahead`: the requests by which each is ahead of its share (`shares`), the router's to change.
    """

    __slots__ = (
        "_label_columns",
        "ahead",
        "block_size",
        "block_sizes",
        "full_rows",
        "has_reserve",
        "has_shares",
        "has_whole_servers",
        "last_turns",
        "lasting_rows",
        "least_context",
        "least_room_tokens",
        "mates",
        "max_waiting_requests",
        "queued_tokens",
        "request_counts",
        "room_tokens",
        "rows",
        "saturated_rows",
        "used_tokens",
        "views",
        "weights",
        "worker_ids",
    )

    def __init__(
        self, views: Iterable[WorkerView], max_waiting_requests: int, seed: int = 0, ahead: dict[str, float] | None = None
    ) -> None:
        """`seed` says in which order workers that were never chosen take their first turn."""
        self.views = list(views)
        self.max_waiting_requests = max_waiting_requests
        self.worker_ids: tuple[WorkerId, ...] = tuple(view.facts.worker_id for view in self.views)
        self.rows = {worker_id: row for row, worker_id in enumerate(self.worker_ids)}
        self.block_sizes = tuple(sorted({view.facts.block_size for view in self.views}))
        self.block_size = self.block_sizes[0] if self.block_sizes else 1
        self.mates = frozenset(mates_of(view.facts) for view in self.views)
        self.least_context = min((length for view in self.views if (length := view.facts.context_length) is not None), default=None)
        self.weights = group_weights(view.facts for view in self.views)
        self.has_shares = len(self.weights) > 1
        self.has_reserve = self.has_shares and 0.0 in self.weights.values()
        self.ahead = {} if ahead is None else ahead
        self.queued_tokens: Column = array("d", map(queued_prefill_tokens, self.views))
        self.used_tokens: Column = array("d", map(_used_tokens, self.views))
        self.room_tokens: Column = array("d", map(_room_tokens, self.views))
        self.request_counts: Column = array("d", map(in_flight_count, self.views))
        self.least_room_tokens = min(self.room_tokens, default=0.0)  # nobody has less; perhaps all have more
        self.full_rows = {row for row, view in enumerate(self.views) if self._is_full(view)}
        self.saturated_rows = {row for row, view in enumerate(self.views) if is_saturated(view)}
        # Turns count up from 0, so that any of these is longer ago; a router that begins elsewhere has another order.
        self.last_turns = array("q", (-1 - xxhash.xxh3_64_intdigest(name.encode(), seed) % (1 << 62) for name in self.worker_ids))
        self.has_whole_servers = any(view.facts.serves_whole for view in self.views)
        self.lasting_rows: dict[Leg, Sequence[int]] = {}  # what lasting filters leave for an ordinary request; the router's
        self._label_columns: dict[tuple[tuple[str, str], ...], Column] = {}

    def __len__(self) -> int:
        return len(self.views)

    def note(self, view: WorkerView) -> None:
        """This worker stands like this now. One that has no row here is none of ours."""
        row = self.rows.get(view.facts.worker_id)
        if row is None:
            return
        self.views[row] = view
        self.queued_tokens[row] = queued_prefill_tokens(view)
        self.request_counts[row] = in_flight_count(view)
        used, block_count, block_size = used_block_count(view), view.facts.block_count, view.facts.block_size
        self.used_tokens[row] = block_size * used
        self.room_tokens[row] = room = block_size * (block_count - used)
        if room < self.least_room_tokens:
            self.least_room_tokens = room
        if self._is_full(view):
            self.full_rows.add(row)
        elif self.full_rows:
            self.full_rows.discard(row)
        if is_saturated(view):
            self.saturated_rows.add(row)
        elif self.saturated_rows:
            self.saturated_rows.discard(row)

    def has_room_everywhere(self, token_count: int) -> bool:
        """Whether every worker's pool could take so many tokens."""
        if token_count > self.least_room_tokens:
            self.least_room_tokens = min(self.room_tokens, default=0.0)
        return token_count <= self.least_room_tokens

    def differing_labels(self, wanted: Mapping[str, str]) -> Column:
        """Per worker, how many of these labels it does not carry with the same value."""
        key = tuple(sorted(wanted.items()))
        column = self._label_columns.get(key)
        if column is None:
            if len(self._label_columns) >= _MAX_LABEL_SETS:
                self._label_columns.clear()
            column = array("d", (sum(view.facts.labels.get(name) != value for name, value in key) for view in self.views))
            self._label_columns[key] = column
        return column

    def has_headroom(self, rows: Sequence[int]) -> bool:
        """Whether a worker of these rows is not saturated."""
        saturated = self.saturated_rows
        return bool(rows) if not saturated else any(row not in saturated for row in rows)

    def _is_full(self, view: WorkerView) -> bool:
        return view.booked_request_count >= view.facts.max_running + self.max_waiting_requests


class Lineup(Sequence[WorkerView]):
    """Workers for one leg of one request. Valid until the router changes something: whoever keeps it copies the columns.

    expected: leading blocks that workers are going to hold, where these are more than they hold.
    home: the worker, in that life of it, where the request's session was last.
    partner: on the decode leg of a split request, the worker that computes the prompt; on its prefill leg, the one that would serve it
        whole.
    rows: those that the filters have left; None: all.
    uses_lower_tiers: whether anything is known to rest below the device.
    """

    __slots__ = ("expected", "home", "overlaps", "partner", "rows", "standings", "uses_lower_tiers")

    def __init__(
        self,
        standings: Standings,
        overlaps: Overlaps,
        expected: Mapping[WorkerId, int] = NOT_EXPECTED,
        home: tuple[WorkerId, Epoch] | None = None,
        partner: WorkerFacts | None = None,
    ) -> None:
        self.standings = standings
        self.overlaps = overlaps
        self.expected = expected
        self.home = home
        self.partner = partner
        self.rows: Sequence[int] | None = None
        self.uses_lower_tiers = overlaps.level_count > 1

    @classmethod
    def of_views(cls, views: Sequence[WorkerView]) -> Lineup:
        """For parts outside a router: as the views say."""
        depths = {view.facts.worker_id: view.overlap_block_count for view in views}
        return cls(Standings(views, max_waiting_requests=1 << 30), NaiveOverlaps(dict.fromkeys(Tier, depths)))

    @property
    def worker_ids(self) -> Sequence[WorkerId]:
        return self.standings.worker_ids

    def depth(self, row: int, tier: Tier = Tier.DEVICE) -> int:
        """Leading blocks that this worker holds in this tier or a faster one, or is going to hold."""
        worker_id = self.standings.worker_ids[row]
        depth = self.overlaps.depth(worker_id, tier)
        return max(depth, self.expected.get(worker_id, 0)) if self.expected else depth

    def depths(self, tier: Tier = Tier.DEVICE) -> list[int]:
        depths = self.overlaps.depths(self.standings.worker_ids, tier)
        for worker_id, depth in self.expected.items():
            row = self.standings.rows.get(worker_id)
            if row is not None and depth > depths[row]:
                depths[row] = depth
        return depths

    def tokens_beyond(self, token_count: int, tier: Tier = Tier.DEVICE) -> Column:
        """Of a prompt of so many tokens, those behind what each worker holds in this tier or a faster one."""
        standings = self.standings
        column = self.overlaps.tokens_beyond(standings.worker_ids, standings.block_size, token_count, 0, tier)
        for worker_id, depth in self.expected.items():
            row = standings.rows.get(worker_id)
            if row is not None:
                column[row] = min(column[row], max(token_count - depth * standings.views[row].facts.block_size, 0))
        return column

    def __len__(self) -> int:
        return len(self.standings)

    @overload
    def __getitem__(self, row: int) -> WorkerView: ...
    @overload
    def __getitem__(self, row: slice) -> list[WorkerView]: ...
    def __getitem__(self, row: int | slice) -> WorkerView | list[WorkerView]:
        if isinstance(row, slice):
            return [self[one] for one in range(len(self))[row]]
        return self.standings.views[row].with_overlap(self.depth(range(len(self))[row]))

    def __iter__(self) -> Iterator[WorkerView]:
        return map(WorkerView.with_overlap, self.standings.views, self.depths())


def _used_tokens(view: WorkerView) -> int:
    return view.facts.block_size * used_block_count(view)


def _room_tokens(view: WorkerView) -> int:
    """What the pool could still take; negative where more is booked than there is."""
    return view.facts.block_size * (view.facts.block_count - used_block_count(view))
