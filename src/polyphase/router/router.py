"""Where a request goes: keeps what is known of the workers, and turns a request into a booked route.

    1. who would serve it whole?        filter → score → pick among decode workers
    2. is there much to compute there?  if not, or if nobody can prefill for others: that is the route
    3. otherwise split                  a prefill worker that computes the blocks, a decode worker that only has to take them

One owner, no awaiting: the frontend's event loop calls it, and each call leaves it consistent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from polyphase.core.ids import Epoch, RequestId, SequenceHash, WorkerId
from polyphase.router.bookings import Bookings, LegBooking
from polyphase.router.candidates import Candidates
from polyphase.router.contracts import Filter
from polyphase.router.cost import block_count_needed, queued_prefill_tokens, usable_block_count
from polyphase.router.filters import no_worker_serves
from polyphase.router.groups import Mates, mates_of
from polyphase.router.indexes import DEFAULT_BELIEF_CAPACITY, DEFAULT_CAPACITY, PredictedPrefixIndex, default_index
from polyphase.router.lineup import Lineup, Standings
from polyphase.router.overlaps import OverlapsBySize
from polyphase.router.pace import Paces
from polyphase.router.parts import BUILT_IN, Parts
from polyphase.router.policies import policy_of
from polyphase.router.predictions import ExpectedPrefixes
from polyphase.router.pull import PullsUnderWay, choose_pull, may_pull
from polyphase.router.sessions import Sessions
from polyphase.router.shares import claimants_of, settle
from polyphase.router.split import Side, reason_of, why_not_split, worth_of_split
from polyphase.router.types import (
    BOTH,
    DECODE,
    PREFILL,
    IndexFill,
    Leg,
    Overlaps,
    Placement,
    PrefixIndex,
    Pull,
    Route,
    RouteRequest,
    RouterSettings,
    WorkerFacts,
    WorkerView,
)
from polyphase.wire.events import AllCleared, BlocksRemoved, BlocksStored, Digests, KvEvent, Load, Tier, TierDigest

ALL_TIERS = tuple(Tier)
_LOWEST = Tier.OBJECT


@dataclass(slots=True)
class _Known:
    """What is known of one living worker."""

    facts: WorkerFacts
    load: Load | None = None
    last_turn: int | None = None  # at which it was chosen


@dataclass(slots=True)
class _Found:
    """What is known of a prompt: who holds how much of it, and who is going to."""

    overlaps: Overlaps
    expected: Mapping[WorkerId, int]


@dataclass(slots=True)
class _Choice:
    """A worker for a leg, before anything is booked. `uncached_tokens`: those of the prompt that it holds in no tier.

    `pull`: from whom it may have some of these, if it computes the prompt.
    """

    placement: Placement
    facts: WorkerFacts
    row: int
    turn: int
    uncached_tokens: int
    pull: Pull | None = None

    @property
    def wanted_pull(self) -> Pull | None:
        return self.pull if self.pull is not None and self.pull.is_wanted else None

    @property
    def tokens_to_compute(self) -> int:
        pull = self.wanted_pull
        return self.uncached_tokens if pull is None else self.uncached_tokens - pull.saved_token_count

    def side(self, view: WorkerView) -> Side:
        pull = self.wanted_pull
        return Side(view, self.tokens_to_compute, 0.0 if pull is None else pull.pull_ms or 0.0)


class Router:
    """`parts`: those that the policy may name. Raises: ConfigurationError if the policy or one of its parts does not exist."""

    def __init__(self, settings: RouterSettings, index: PrefixIndex | None = None, parts: Parts = BUILT_IN) -> None:
        self.bookings = Bookings()
        self._settings = settings
        self._policy = policy_of(settings.policy, parts)
        self._weighs_workers = self._policy.weighs_workers
        self.index: PrefixIndex = default_index(settings.index.capacity or DEFAULT_CAPACITY) if index is None else index
        # Beliefs about workers that tell nothing lie in the same index as what the others tell.
        self._beliefs = PredictedPrefixIndex(
            min(self.index.capacity, DEFAULT_BELIEF_CAPACITY), settings.index.predicted_lifetime_ns, self.index
        )
        self._known: dict[WorkerId, _Known] = {}
        self._standings: dict[str, Standings] = {}  # by model; made when first wanted
        self._ahead: dict[str, dict[str, float]] = {}  # by model and group; see `shares`
        self._expected = ExpectedPrefixes()
        self.paces = Paces()
        self._pulls = PullsUnderWay()
        self._sessions = Sessions(settings.sessions)
        self._turn = settings.first_turn

    # What is known of the workers

    def upsert_worker(self, facts: WorkerFacts) -> None:
        """A worker joined, or changed its role, or began to drain. A new epoch is a new life: nothing of the old one counts.

        An older epoch than the known one is ignored: it is news of a life that is over.
        """
        known = self._known.get(facts.worker_id)
        if known is not None and facts.epoch < known.facts.epoch:
            return
        if known is not None and facts.epoch == known.facts.epoch:
            known.facts = replace(facts, is_stalled=known.facts.is_stalled)
        else:
            self.remove_worker(facts.worker_id)
            self._known[facts.worker_id] = _Known(facts)
        self._standings.clear()

    def set_stalled(self, worker_id: WorkerId, is_stalled: bool) -> None:
        """It gets no requests while it stands still. Unknown workers are ignored."""
        known = self._known.get(worker_id)
        if known is not None:
            known.facts = replace(known.facts, is_stalled=is_stalled)
            self._standings.clear()

    def remove_worker(self, worker_id: WorkerId) -> None:
        """Its blocks and bookings go with it. Unknown workers are ignored."""
        known = self._known.pop(worker_id, None)
        if known is None:
            return
        self._beliefs.clear(worker_id)  # and all else that is in the index
        self.bookings.drop_worker(worker_id)
        self._standings.clear()
        self._expected.drop_worker(worker_id)
        self.paces.drop_worker(worker_id)

    def replace_blocks(self, worker_id: WorkerId, epoch: Epoch, hashes: Iterable[SequenceHash]) -> None:
        """The worker holds exactly these."""
        if self._is_followed(worker_id, epoch):
            self.index.clear(worker_id)
            self.index.store(worker_id, hashes)

    def add_blocks(self, worker_id: WorkerId, epoch: Epoch, hashes: Iterable[SequenceHash], tier: Tier = Tier.DEVICE) -> None:
        """The worker holds these besides what is known."""
        if self._is_followed(worker_id, epoch):
            self.index.store(worker_id, hashes, tier)

    def digests(self, worker_id: WorkerId, epoch: Epoch) -> Digests | None:
        """Of all that this worker told of its blocks, as far as it got here; None if it is not known, or not followed so closely."""
        if not self._is_followed(worker_id, epoch):
            return None
        digests: Digests = {}
        for tier in ALL_TIERS:
            digest = self.index.digest(worker_id, tier)
            if digest is None:
                return None
            if digest[0]:
                digests[tier] = TierDigest(*digest)
        return digests

    def apply(self, worker_id: WorkerId, epoch: Epoch, events: list[KvEvent]) -> None:
        """Blocks come and go, in each tier by itself."""
        if not self._is_followed(worker_id, epoch):
            return
        for event in events:
            match event:
                case BlocksStored():
                    self.index.store(worker_id, cast("list[SequenceHash]", event.sequence_hashes), event.tier)
                case BlocksRemoved():
                    self.index.remove(worker_id, cast("list[SequenceHash]", event.sequence_hashes), event.tier)
                case AllCleared():
                    self.index.clear(worker_id)

    def report_load(self, worker_id: WorkerId, epoch: Epoch, load: Load) -> None:
        if self._is_current(worker_id, epoch):
            self._known[worker_id].load = load
            self.bookings.mark_reported(worker_id)

    def workers(self) -> list[WorkerView]:
        """All known workers in the order of their names, for people to look at; no request, so no overlap."""
        return [self._view(worker_id) for worker_id in sorted(self._known)]

    def facts(self) -> list[WorkerFacts]:
        """Of all known workers, in no order."""
        return [known.facts for known in self._known.values()]

    def facts_of(self, worker_id: WorkerId) -> WorkerFacts | None:
        known = self._known.get(worker_id)
        return None if known is None else known.facts

    def serves(self, model: str) -> bool:
        """Whether a living worker has this model, be it draining or full."""
        return any(known.facts.model == model for known in self._known.values())

    def block_sizes(self, model: str) -> Sequence[int]:
        """In tokens, of the workers of this model, the smallest first."""
        standings = self._standings.get(model)
        if standings is not None:
            return standings.block_sizes
        return sorted({known.facts.block_size for known in self._known.values() if known.facts.model == model})

    def cached_block_count(self, worker_id: WorkerId, hashes: Sequence[SequenceHash]) -> int:
        """Leading blocks of `hashes` that this worker is known to hold now, in whatever tiers."""
        return self.index.match(hashes).depth(worker_id, _LOWEST)

    def indexed_block_count(self, worker_id: WorkerId) -> int:
        return self.index.block_count(worker_id)

    def index_fill(self) -> IndexFill:
        index = self.index
        forgotten = index.forgotten + self._beliefs.forgotten
        return IndexFill(index.kind, index.size, index.capacity, forgotten, self._beliefs.size, index.heap_bytes)

    # Requests

    def route(self, request: RouteRequest) -> Route:
        """Choose workers, and book prefill tokens and decode blocks on them.

        A request that was routed before (it migrates) is judged and booked anew.

        Raises: NoWorkers, Overloaded. Then nothing is booked, nor what was booked before.
        Owner: the caller calls `release` at the request's end, however it ends.
        """
        self.release(request.request_id)
        standings = self._standings_of(request)
        self._beliefs.expire(request.now_ns)
        found = self._find(request, standings.block_sizes)

        if not standings.has_whole_servers:
            return self._route_in_halves(request, standings, found)
        servers = self._lineup(request, BOTH, standings, found)
        self._filter(request, BOTH, servers, is_required=True)
        whole = self._choose(request, BOTH, servers)
        whole.pull = self._pull_to(whole, request, standings, found)
        if standings.has_shares:
            settle(standings.ahead, claimants_of(servers), whole.facts.group)
        if request.needs:
            self._book(request, found, whole)
            reason = f"passed through: {', '.join(sorted(request.needs))}"
            return Route(request.request_id, whole.placement, None, reason, "passed-through")
        helpers = self._helpers(request, standings, found, whole.facts)
        if helpers is None:
            self._book(request, found, whole)
            reason = "whole: no prefill worker is available that can hand over to one that decodes"
            return Route(request.request_id, whole.placement, None, reason, "no-prefill-worker", whole.pull)
        against = why_not_split(self._settings.split, request, whole.placement, whole.tokens_to_compute, whole.wanted_pull)
        if against is not None:
            self._book(request, found, whole)
            rule, reason = against
            return Route(request.request_id, whole.placement, None, reason, rule, whole.pull)

        prefill = self._choose(request, PREFILL, helpers)
        prefill.pull = self._pull_to(prefill, request, standings, found)
        takers = self._lineup(request, DECODE, standings, found, partner=prefill.facts)
        self._filter(request, DECODE, takers, is_required=True)
        decode = self._choose(request, DECODE, takers)
        alone, helper = (choice.side(standings.views[choice.row]) for choice in (whole, prefill))
        worth = None
        if self._settings.split.is_weighed:
            to_move = max(request.prompt_token_count - decode.placement.overlap_block_count * decode.facts.block_size, 0)
            worth = worth_of_split(alone, helper, standings.views[decode.row], to_move, self.paces)
        reason = reason_of(worth, alone, helper, request.prompt_token_count)
        if worth is not None and not worth.does_pay:
            self._book(request, found, whole)
            return Route(request.request_id, whole.placement, None, reason, "does-not-pay", whole.pull)
        self._book(request, found, decode, prefill)
        return Route(request.request_id, decode.placement, prefill.placement, reason, "split", prefill.pull)

    def _route_in_halves(self, request: RouteRequest, standings: Standings, found: _Found) -> Route:
        """Of engines that do one half each: whatever the prompt, it takes two of them. Raises: NoWorkers, Overloaded."""
        helpers = self._lineup(request, PREFILL, standings, found)
        self._filter(request, PREFILL, helpers, is_required=True)
        prefill = self._choose(request, PREFILL, helpers)
        takers = self._lineup(request, DECODE, standings, found, partner=prefill.facts)
        self._filter(request, DECODE, takers, is_required=True)
        decode = self._choose(request, DECODE, takers)
        self._book(request, found, decode, prefill)
        reason = "split: these engines compute prompts or generate, and never do both"
        return Route(request.request_id, decode.placement, prefill.placement, reason, "split")

    def has_headroom(self, request: RouteRequest) -> bool:
        """Whether a worker would begin with it soon; if not, it had better wait where it can still be sent elsewhere. Books nothing.

        Raises: NoWorkers. Cost: O(workers whose bookings or load changed).
        """
        standings = self._standings_of(request)
        serving = BOTH if standings.has_whole_servers else DECODE
        servers = self._able(request, serving, standings, is_required=True)
        if not standings.has_headroom(servers):
            return False
        if serving is DECODE:
            return standings.has_headroom(self._able(request, PREFILL, standings, is_required=True))
        helpers = self._able(request, PREFILL, standings, is_required=False)
        if len(standings.mates) == 1:
            return standings.has_headroom(helpers) or not self._needs_one_of(helpers, request)
        return any(self._has_headroom_among(mates, servers, helpers, standings, request) for mates in standings.mates)

    def _has_headroom_among(
        self, mates: Mates, servers: Sequence[int], helpers: Sequence[int], standings: Standings, request: RouteRequest
    ) -> bool:
        servers, helpers = ([row for row in rows if mates_of(standings.views[row].facts) == mates] for rows in (servers, helpers))
        return standings.has_headroom(servers) and (standings.has_headroom(helpers) or not self._needs_one_of(helpers, request))

    def waits_for_prefill(self, request: RouteRequest) -> bool:
        """Whether it needs a prefill worker besides: those that do and those that do not wait for different workers. Raises: NoWorkers."""
        standings = self._standings_of(request)
        helpers = self._able(request, PREFILL, standings, is_required=False)
        return not standings.has_whole_servers or self._needs_one_of(helpers, request)

    def _needs_one_of(self, helpers: Sequence[int], request: RouteRequest) -> bool:
        return bool(helpers) and not request.needs and request.prompt_token_count >= self._settings.split.min_uncached_tokens

    def mark_prefill_done(self, request_id: RequestId) -> None:
        self.bookings.end_prefill(request_id)
        self._expected.settle(request_id)
        self._pulls.end(request_id)

    def release(self, request_id: RequestId) -> None:
        self.bookings.release(request_id)
        self._expected.settle(request_id)
        self._pulls.end(request_id)

    def _standings_of(self, request: RouteRequest) -> Standings:
        """Raises: NoWorkers."""
        for worker_id in self.bookings.take_changed():
            known = self._known.get(worker_id)
            if known is not None and known.facts.model in self._standings:
                self._standings[known.facts.model].note(self._view(worker_id))
        standings = self._standings.get(request.model)
        if standings is None:
            names = sorted(name for name, known in self._known.items() if known.facts.model == request.model)
            if not names:
                raise no_worker_serves(request)
            ahead = self._ahead.setdefault(request.model, {})
            standings = Standings(map(self._view, names), self._settings.max_waiting_requests, self._settings.first_turn, ahead)
            for row, name in enumerate(names):
                last_turn = self._known[name].last_turn
                if last_turn is not None:
                    standings.last_turns[row] = last_turn
            self._standings[request.model] = standings
        return standings

    def _lineup(self, request: RouteRequest, leg: Leg, standings: Standings, found: _Found, partner: WorkerFacts | None = None) -> Lineup:
        home = None if request.session is None else self._sessions.home(request.model, request.session, leg, request.now_ns)
        return Lineup(standings, found.overlaps, found.expected, home, partner)

    def _find(self, request: RouteRequest, block_sizes: Sequence[int]) -> _Found:
        if len(block_sizes) == 1:
            return self._find_in_blocks(request, block_sizes[0])
        by_size = [(size, self._find_in_blocks(request, size)) for size in block_sizes]
        overlaps = OverlapsBySize([(size, found.overlaps) for size, found in by_size])
        return _Found(overlaps, {worker_id: depth for _, found in by_size for worker_id, depth in found.expected.items()})

    def _find_in_blocks(self, request: RouteRequest, block_size: int) -> _Found:
        hashes = request.hashes_of(block_size)
        # A last block that ends with the prompt is of no use: the last token is computed in any case.
        usable = usable_block_count(request.prompt_token_count, block_size)
        if usable < len(hashes):
            hashes = hashes[:usable]
        overlaps = self.index.match(hashes)
        return _Found(overlaps, self._expected.beyond(hashes, overlaps))

    def _helpers(self, request: RouteRequest, standings: Standings, found: _Found, server: WorkerFacts) -> Lineup | None:
        """Who could compute the prompt for workers like `server`, if anybody."""
        if not self._able(request, PREFILL, standings, is_required=False):
            return None
        helpers = self._lineup(request, PREFILL, standings, found, partner=server)
        return helpers if self._filter(request, PREFILL, helpers, is_required=False) else None

    def _filter(self, request: RouteRequest, leg: Leg, workers: Lineup, *, is_required: bool) -> bool:
        """Sets `workers.rows`. Returns: whether any are left. Raises: why there are none, if some are required."""
        rows = self._able(request, leg, workers.standings, is_required=is_required, workers=workers)
        rows = _kept(self._policy.passing_filters, request, leg, workers, rows, is_required)
        workers.rows = None if len(rows) == len(workers.standings.views) else rows
        return bool(rows)

    def _able(
        self, request: RouteRequest, leg: Leg, standings: Standings, *, is_required: bool, workers: Lineup | None = None
    ) -> Sequence[int]:
        """Rows that the lasting filters leave: who may take the leg, now or later. Raises: why there are none, if some are required."""
        is_ordinary = request.is_ordinary
        rows = standings.lasting_rows.get(leg) if is_ordinary else None
        if rows is None:
            workers = workers or Lineup(standings, self.index.match(()))
            rows = _kept(self._policy.lasting_filters, request, leg, workers, range(len(workers)), is_required)
            if is_ordinary:
                standings.lasting_rows[leg] = rows
        return rows

    def _choose(self, request: RouteRequest, leg: Leg, workers: Lineup) -> _Choice:
        weighing = self._policy.weigh(request, leg, workers)
        turn = self._turn
        self._turn += 1
        row = self._policy.picker.pick(weighing.scores, workers, turn)
        view = workers.standings.views[row]
        facts = view.facts
        depth = workers.depth(row)
        held = workers.depth(row, _LOWEST) if workers.uses_lower_tiers else depth
        uncached = request.prompt_token_count - held * facts.block_size
        queued = queued_prefill_tokens(view) if self._weighs_workers else None
        placement = Placement(leg, facts.worker_id, facts.epoch, depth, Candidates(workers, weighing, row), queued, facts.block_size)
        return _Choice(placement, facts, row, turn, max(uncached, 0))

    def _pull_to(self, choice: _Choice, request: RouteRequest, standings: Standings, found: _Found) -> Pull | None:
        """From whom the chosen worker might pull what it lacks of the prompt."""
        rule, size = self._settings.pull, choice.facts.block_size
        if not rule.is_on or choice.uncached_tokens < rule.min_tokens:
            return None
        depths = found.overlaps.depths(standings.worker_ids)
        held = request.prompt_token_count - choice.uncached_tokens
        if max(depths) * standings.block_sizes[-1] - held < rule.min_tokens:
            return None
        holders = (
            (view.facts, depth * size)
            for view, depth in zip(standings.views, depths, strict=True)
            if depth * size > held and view.facts.worker_id not in request.excluded and may_pull(choice.facts, view.facts)
        )
        return choose_pull(rule, choice.facts, held, holders, self.paces, self._pulls, request.now_ns)

    def _book(self, request: RouteRequest, found: _Found, decode: _Choice, prefill: _Choice | None = None) -> None:
        legs = []
        standings = self._standings[request.model]
        for choice in (decode,) if prefill is None else (decode, prefill):
            facts, leg = choice.facts, choice.placement.leg
            prefill_tokens = 0 if leg is DECODE else choice.tokens_to_compute
            blocks = block_count_needed(request, facts.block_size, leg)
            legs.append(LegBooking(facts.worker_id, prefill_tokens, blocks, leg is PREFILL))
            standings.last_turns[choice.row] = self._known[facts.worker_id].last_turn = choice.turn
            if not self.follows_events(facts):
                self._beliefs.expect(facts.worker_id, request.hashes_of(facts.block_size), request.now_ns)
        self.bookings.book(request.request_id, legs)
        prompt_choice = prefill or decode
        prompt = prompt_choice.facts
        if (pull := prompt_choice.wanted_pull) is not None:
            self._pulls.begin(request.request_id, pull.holder)
        hashes = request.hashes_of(prompt.block_size)
        self._expected.expect(request.request_id, prompt.worker_id, hashes, found.overlaps.depth(prompt.worker_id))
        if request.session is not None:
            decode_home, prompt_home = (decode.facts.worker_id, decode.facts.epoch), (prompt.worker_id, prompt.epoch)
            self._sessions.note(request.model, request.session, decode_home, prompt_home, request.now_ns)

    def _view(self, worker_id: WorkerId) -> WorkerView:
        """Without a request, so without overlap."""
        known = self._known[worker_id]
        booked, unreported = self.bookings.sums_of(worker_id)
        return WorkerView(
            known.facts,
            known.load,
            0,
            booked.prefill_tokens,
            booked.block_count,
            booked.request_count,
            unreported.prefill_tokens,
            unreported.block_count,
            unreported.request_count,
        )

    def follows_events(self, facts: WorkerFacts) -> bool:
        """Whether what the worker tells of its blocks is believed; if not, what is routed there is, for a while."""
        return facts.publishes_events and self._settings.index.follows_events

    def _is_followed(self, worker_id: WorkerId, epoch: Epoch) -> bool:
        return self._is_current(worker_id, epoch) and self.follows_events(self._known[worker_id].facts)

    def _is_current(self, worker_id: WorkerId, epoch: Epoch) -> bool:
        known = self._known.get(worker_id)
        return known is not None and known.facts.epoch == epoch


def _kept(
    filters: Iterable[Filter], request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int], is_required: bool
) -> Sequence[int]:
    """Those of `rows` that all filters keep. Raises: what the filter says that left none, if some are required."""
    for one in filters:
        count, rows = len(rows), one.keep(request, leg, workers, rows) if rows else rows
        if not rows and is_required:
            raise one.refusal(request, count)
    return rows
