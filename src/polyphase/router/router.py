"""Where a request goes: keeps what is known of the workers, and turns a request into a booked route.

    1. who would serve it whole?        filter → score → pick among decode workers
    2. is there much to compute there?  if not, or if nobody can prefill for others: that is the route
    3. otherwise split                  a decode worker that only has to take the blocks, a prefill worker that computes them

One owner, no awaiting: the frontend's event loop calls it, and each call leaves it consistent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from polyphase.core.ids import Epoch, RequestId, SequenceHash, WorkerId
from polyphase.router import filters
from polyphase.router.bookings import Bookings, LegBooking
from polyphase.router.cost import block_count_needed, uncached_tokens
from polyphase.router.index import NaivePrefixIndex
from polyphase.router.policies import policy_named
from polyphase.router.predictions import ExpectedPrefixes
from polyphase.router.types import (
    Candidate,
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
from polyphase.wire.events import AllCleared, BlocksRemoved, BlocksStored, KvEvent, Load, Tier


@dataclass(slots=True)
class _Known:
    """What is known of one living worker."""

    facts: WorkerFacts
    load: Load | None = None


@dataclass(frozen=True, slots=True)
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
        self._index: PrefixIndex = NaivePrefixIndex() if index is None else index
        self._known: dict[WorkerId, _Known] = {}
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
            known.facts = facts
            return
        self.remove_worker(facts.worker_id)
        self._known[facts.worker_id] = _Known(facts)

    def remove_worker(self, worker_id: WorkerId) -> None:
        """Its blocks and bookings go with it. Unknown workers are ignored."""
        known = self._known.pop(worker_id, None)
        if known is None:
            return
        self._index.clear(worker_id)
        self.bookings.drop_worker(worker_id)
        self._expected.drop_worker(worker_id)
        if not self.serves(known.facts.model):
            for is_prefill in (False, True):
                self._turns.pop((known.facts.model, is_prefill), None)

    def replace_blocks(self, worker_id: WorkerId, epoch: Epoch, hashes: Iterable[SequenceHash]) -> None:
        """The worker holds exactly these."""
        if self._is_current(worker_id, epoch):
            self._index.clear(worker_id)
            self._index.store(worker_id, hashes)

    def apply(self, worker_id: WorkerId, epoch: Epoch, events: list[KvEvent]) -> None:
        """Blocks of the device tier come and go; lower tiers are not credited yet."""
        if not self._is_current(worker_id, epoch):
            return
        for event in events:
            match event:
                case BlocksStored(tier=Tier.DEVICE):
                    self._index.store(worker_id, map(SequenceHash, event.sequence_hashes))
                case BlocksRemoved(tier=Tier.DEVICE):
                    self._index.remove(worker_id, map(SequenceHash, event.sequence_hashes))
                case AllCleared():
                    self._index.clear(worker_id)
                case _:
                    pass

    def report_load(self, worker_id: WorkerId, epoch: Epoch, load: Load) -> None:
        if self._is_current(worker_id, epoch):
            self._known[worker_id].load = load
            self.bookings.mark_reported(worker_id)

    def workers(self) -> list[WorkerView]:
        """All known workers in the order of their names, for people to look at; no request, so no overlap."""
        return [self._view(self._known[worker_id].facts, {}) for worker_id in sorted(self._known)]

    def serves(self, model: str) -> bool:
        """Whether a living worker has this model, be it draining or full."""
        return any(known.facts.model == model for known in self._known.values())

    # Requests

    def route(self, request: RouteRequest) -> Route:
        """Choose workers, and book prefill tokens and decode blocks on them.

        A request that was routed before (it migrates) is judged and booked anew.

        Raises: NoWorkers, Overloaded. Then nothing is booked, nor what was booked before.
        Owner: the caller calls `release` at the request's end, however it ends.
        """
        self.release(request.request_id)
        free = filters.available(request, [known.facts for known in self._known.values()])
        overlaps = self._expected.deepen(request.sequence_hashes, self._index.match(request.sequence_hashes))
        able = filters.able_to_serve_whole(free)
        servers = self._roomy_views(able, overlaps)
        if not servers:
            raise filters.refuse_full(request, len(able), self._settings.max_waiting_requests)
        helpers = self._roomy_views(filters.able_to_prefill(free), overlaps)

        whole = self._choose(request, Leg.BOTH, servers)
        reason_against = why_not_split(self._settings.split, request, whole.worker, has_prefill_workers=bool(helpers))
        if reason_against is not None:
            self._advance(request.model, is_prefill=False)
            self._book(request, whole)
            return Route(request.request_id, whole.placement, None, reason_against)

        decode = self._choose(request, Leg.DECODE, servers)
        prefill = self._choose(request, Leg.PREFILL, helpers)
        self._advance(request.model, is_prefill=False)
        self._advance(request.model, is_prefill=True)
        self._book(request, decode, prefill)
        to_compute = uncached_tokens(request, prefill.worker)
        reason = f"split: {to_compute} of {request.prompt_token_count} prompt tokens to compute away from decoding requests"
        return Route(request.request_id, decode.placement, prefill.placement, reason)

    def mark_prefill_done(self, request_id: RequestId) -> None:
        self.bookings.end_prefill(request_id)
        self._expected.settle(request_id)

    def release(self, request_id: RequestId) -> None:
        self.bookings.release(request_id)
        self._expected.settle(request_id)

    def _choose(self, request: RouteRequest, leg: Leg, workers: Sequence[WorkerView]) -> _Choice:
        scores = self._policy.score(request, leg, workers)
        picked = self._policy.picker.pick(scores, workers, self._settings.first_turn + self._turns[request.model, leg is Leg.PREFILL])
        worker = workers[picked]
        # The chosen one stands first among equals.
        order = sorted(range(len(workers)), key=lambda position: (-scores[position], position != picked, position))
        candidates = tuple(_candidate(workers[position], scores[position]) for position in order)
        return _Choice(worker, Placement(leg, worker.facts.worker_id, worker.facts.epoch, worker.overlap_block_count, candidates))

    def _book(self, request: RouteRequest, decode: _Choice, prefill: _Choice | None = None) -> None:
        legs = []
        for choice in (decode, prefill):
            if choice is None:
                continue
            facts, leg = choice.worker.facts, choice.placement.leg
            prefill_tokens = 0 if leg is Leg.DECODE else uncached_tokens(request, choice.worker)
            blocks = block_count_needed(request, facts.block_size, leg)
            legs.append(LegBooking(facts.worker_id, prefill_tokens, blocks, ends_with_prefill=leg is Leg.PREFILL))
        self.bookings.book(request.request_id, legs)
        self._expected.expect(request.request_id, (prefill or decode).worker.facts.worker_id, request.sequence_hashes)

    def _roomy_views(self, workers: Sequence[WorkerFacts], overlaps: Mapping[WorkerId, int]) -> list[WorkerView]:
        return filters.with_room([self._view(facts, overlaps) for facts in workers], self._settings.max_waiting_requests)

    def _view(self, facts: WorkerFacts, overlaps: Mapping[WorkerId, int]) -> WorkerView:
        booked = self.bookings.of(facts.worker_id)
        unreported = self.bookings.unreported_of(facts.worker_id)
        return WorkerView(
            facts=facts,
            load=self._known[facts.worker_id].load,
            overlap_block_count=overlaps.get(facts.worker_id, 0),
            booked_prefill_tokens=booked.prefill_tokens,
            booked_block_count=booked.block_count,
            booked_request_count=booked.request_count,
            unreported_prefill_tokens=unreported.prefill_tokens,
            unreported_block_count=unreported.block_count,
        )

    def _advance(self, model: str, *, is_prefill: bool) -> None:
        # Turns are counted per model and leg: with one count for all, two requests in strict alternation would each meet only
        # every other worker.
        self._turns[model, is_prefill] += 1

    def _is_current(self, worker_id: WorkerId, epoch: Epoch) -> bool:
        known = self._known.get(worker_id)
        return known is not None and known.facts.epoch == epoch


def why_not_split(rule: SplitRule, request: RouteRequest, worker: WorkerView, *, has_prefill_workers: bool) -> str | None:
    """Why `worker`, the best one for the whole request, does all of it; None if prefill belongs elsewhere."""
    if not has_prefill_workers:
        return "whole: no prefill worker is available beside the decode workers"
    to_compute, prompt = uncached_tokens(request, worker), request.prompt_token_count
    if to_compute < rule.min_uncached_tokens:
        return f"whole: {to_compute} of {prompt} prompt tokens to compute, splitting begins at {rule.min_uncached_tokens}"
    if to_compute < rule.min_uncached_fraction * prompt:
        return f"whole: {prompt - to_compute} of {prompt} prompt tokens are cached on {worker.facts.worker_id}"
    return None


def _candidate(worker: WorkerView, score: float) -> Candidate:
    return Candidate(
        worker_id=worker.facts.worker_id,
        score=score,
        overlap_block_count=worker.overlap_block_count,
        booked_prefill_tokens=worker.booked_prefill_tokens,
        booked_block_count=worker.booked_block_count,
        booked_request_count=worker.booked_request_count,
    )
