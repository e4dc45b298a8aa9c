"""Where a request goes: keeps what is known of the workers, and turns a request into a booked route.

    1. who would serve it whole?        filter → score → pick among decode workers
    2. is there much to compute there?  if not, or if nobody can prefill for others: that is the route
    3. otherwise split                  a decode worker that only has to take the blocks, a prefill worker that computes them

One owner, no awaiting: the frontend's event loop calls it, and each call leaves it consistent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from polyphase.core.ids import Epoch, RequestId, SequenceHash, WorkerId
from polyphase.router import filters
from polyphase.router.bookings import Bookings, LegBooking
from polyphase.router.cost import block_count_needed, uncached_tokens
from polyphase.router.indexes import PredictedPrefixIndex, default_index
from polyphase.router.lineup import Candidates, Lineup, Standings
from polyphase.router.policies import policy_named
from polyphase.router.predictions import ExpectedPrefixes
from polyphase.router.types import (
    Leg,
    Placement,
    PrefixIndex,
    Route,
    RouteRequest,
    RouterSettings,
    SplitRule,
    WorkerFacts,
    WorkerView,
)
from polyphase.wire.events import AllCleared, BlocksRemoved, BlocksStored, KvEvent, Load


@dataclass(slots=True)
class _Known:
    """What is known of one living worker."""

    facts: WorkerFacts
    load: Load | None = None


@dataclass(frozen=True, slots=True)
class _Eligible:
    """Who may serve a request, and who may prefill for it."""

    servers: Standings
    helpers: Standings


@dataclass(slots=True)
class _Choice:
    """A worker for a leg, before anything is booked."""

    worker: WorkerView
    placement: Placement


class Router:
    """Raises: ConfigurationError if there is no such policy."""

    def __init__(self, settings: RouterSettings, index: PrefixIndex | None = None) -> None:
        self.bookings = Bookings()
        self._settings = settings
        self._policy = policy_named(settings.policy)
        self.index: PrefixIndex = default_index() if index is None else index
        self._known: dict[WorkerId, _Known] = {}
        self._eligible: dict[str, _Eligible] = {}  # by model, for requests that exclude nobody; made when first wanted
        self._expected = ExpectedPrefixes()
        self._turns: Counter[tuple[str, bool]] = Counter()  # decisions so far, by model and whether for prefill

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
        self._eligible.clear()

    def set_stalled(self, worker_id: WorkerId, is_stalled: bool) -> None:
        """It gets no requests while it stands still. Unknown workers are ignored."""
        known = self._known.get(worker_id)
        if known is not None:
            known.facts = replace(known.facts, is_stalled=is_stalled)
            self._eligible.clear()

    def remove_worker(self, worker_id: WorkerId) -> None:
        """Its blocks and bookings go with it. Unknown workers are ignored."""
        known = self._known.pop(worker_id, None)
        if known is None:
            return
        self.index.clear(worker_id)
        self.bookings.drop_worker(worker_id)
        self._eligible.clear()
        self._expected.drop_worker(worker_id)
        if not self.serves(known.facts.model):
            for is_prefill in (False, True):
                self._turns.pop((known.facts.model, is_prefill), None)

    def replace_blocks(self, worker_id: WorkerId, epoch: Epoch, hashes: Iterable[SequenceHash]) -> None:
        """The worker holds exactly these."""
        if self._is_current(worker_id, epoch):
            self.index.clear(worker_id)
            self.index.store(worker_id, hashes)

    def apply(self, worker_id: WorkerId, epoch: Epoch, events: list[KvEvent]) -> None:
        """Blocks come and go, in each tier by itself."""
        if not self._is_current(worker_id, epoch):
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

    def cached_block_count(self, worker_id: WorkerId, hashes: Sequence[SequenceHash]) -> int:
        """Leading blocks of `hashes` that this worker is known to hold now."""
        return self.index.match(hashes).depth(worker_id)

    def indexed_block_count(self, worker_id: WorkerId) -> int:
        return self.index.block_count(worker_id)

    # Requests

    def route(self, request: RouteRequest) -> Route:
        """Choose workers, and book prefill tokens and decode blocks on them.

        A request that was routed before (it migrates) is judged and booked anew.

        Raises: NoWorkers, Overloaded. Then nothing is booked, nor what was booked before.
        Owner: the caller calls `release` at the request's end, however it ends.
        """
        self.release(request.request_id)
        eligible = self._eligible_for(request)
        roomy = eligible.servers.with_room()
        if not roomy:
            raise filters.refuse_full(request, len(eligible.servers), self._settings.max_waiting_requests)
        overlaps = self._expected.deepen(request.sequence_hashes, self.index.match(request.sequence_hashes))
        servers = Lineup(roomy, overlaps)
        can_prefill = eligible.helpers.with_room()

        whole = self._choose(request, Leg.BOTH, servers)
        reason_against = why_not_split(self._settings.split, request, whole.worker, has_prefill_workers=bool(can_prefill))
        if reason_against is not None:
            self._advance(request.model, is_prefill=False)
            self._book(request, whole)
            rule, reason = reason_against
            return Route(request.request_id, whole.placement, None, reason, rule)

        decode = self._choose(request, Leg.DECODE, servers)
        prefill = self._choose(request, Leg.PREFILL, Lineup(can_prefill, overlaps))
        self._advance(request.model, is_prefill=False)
        self._advance(request.model, is_prefill=True)
        self._book(request, decode, prefill)
        to_compute = uncached_tokens(request, prefill.worker)
        reason = f"split: {to_compute} of {request.prompt_token_count} prompt tokens to compute away from decoding requests"
        return Route(request.request_id, decode.placement, prefill.placement, reason, "split")

    def mark_prefill_done(self, request_id: RequestId) -> None:
        self.bookings.end_prefill(request_id)
        self._expected.settle(request_id)

    def release(self, request_id: RequestId) -> None:
        self.bookings.release(request_id)
        self._expected.settle(request_id)

    def _eligible_for(self, request: RouteRequest) -> _Eligible:
        """Raises: NoWorkers."""
        for worker_id in self.bookings.take_changed():
            if worker_id in self._known:
                view = self._view(worker_id)
                eligible = self._eligible.get(view.facts.model)
                if eligible is not None:
                    eligible.servers.note(view)
                    eligible.helpers.note(view)
        if request.excluded:
            return self._filter(request)
        if request.model not in self._eligible:
            self._eligible[request.model] = self._filter(request)
        return self._eligible[request.model]

    def _filter(self, request: RouteRequest) -> _Eligible:
        free = filters.available(request, [known.facts for known in self._known.values()])

        def standings(workers: Iterable[WorkerFacts]) -> Standings:
            return Standings((self._view(facts.worker_id) for facts in workers), self._settings.max_waiting_requests)

        return _Eligible(standings(filters.able_to_serve_whole(free)), standings(filters.able_to_prefill(free)))

    def _choose(self, request: RouteRequest, leg: Leg, workers: Lineup) -> _Choice:
        scores = self._policy.score(request, leg, workers)
        picked = self._policy.picker.pick(scores, workers, self._settings.first_turn + self._turns[request.model, leg is Leg.PREFILL])
        worker = workers[picked]
        candidates = Candidates(workers, scores, picked)
        return _Choice(worker, Placement(leg, worker.facts.worker_id, worker.facts.epoch, worker.overlap_block_count, candidates))

    def _book(self, request: RouteRequest, decode: _Choice, prefill: _Choice | None = None) -> None:
        legs = []
        for choice in (decode, prefill):
            if choice is None:
                continue
            facts, leg = choice.worker.facts, choice.placement.leg
            prefill_tokens = 0 if leg is Leg.DECODE else uncached_tokens(request, choice.worker)
            blocks = block_count_needed(request, facts.block_size, leg)
            legs.append(LegBooking(facts.worker_id, prefill_tokens, blocks, leg is Leg.PREFILL))
            if isinstance(self.index, PredictedPrefixIndex):
                self.index.expect(facts.worker_id, request.sequence_hashes, request.now_ns)
        self.bookings.book(request.request_id, legs)
        self._expected.expect(request.request_id, (prefill or decode).worker.facts.worker_id, request.sequence_hashes)

    def _view(self, worker_id: WorkerId) -> WorkerView:
        """Without a request, so without overlap."""
        known = self._known[worker_id]
        booked = self.bookings.of(worker_id)
        unreported = self.bookings.unreported_of(worker_id)
        return WorkerView(
            known.facts,
            known.load,
            0,
            booked.prefill_tokens,
            booked.block_count,
            booked.request_count,
            unreported.prefill_tokens,
            unreported.block_count,
        )

    def _advance(self, model: str, *, is_prefill: bool) -> None:
        # Turns are counted per model and leg: with one count for all, two requests in strict alternation would each meet only
        # every other worker.
        self._turns[model, is_prefill] += 1

    def _is_current(self, worker_id: WorkerId, epoch: Epoch) -> bool:
        known = self._known.get(worker_id)
        return known is not None and known.facts.epoch == epoch


def why_not_split(rule: SplitRule, request: RouteRequest, worker: WorkerView, *, has_prefill_workers: bool) -> tuple[str, str] | None:
    """Why `worker`, the best one for the whole request, does all of it, in short and in words; None if prefill belongs elsewhere."""
    if not has_prefill_workers:
        return "no-prefill-worker", "whole: no prefill worker is available beside the decode workers"
    to_compute, prompt = uncached_tokens(request, worker), request.prompt_token_count
    if to_compute < rule.min_uncached_tokens:
        return "short-prompt", f"whole: {to_compute} of {prompt} prompt tokens to compute, splitting begins at {rule.min_uncached_tokens}"
    if to_compute < rule.min_uncached_fraction * prompt:
        return "cached", f"whole: {prompt - to_compute} of {prompt} prompt tokens are cached on {worker.facts.worker_id}"
    return None
