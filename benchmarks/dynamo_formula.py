"""Dynamo's routing formula with its defaults, for comparison: a statement of what its documentation and source say, not its code.

    adjusted_prefill = max((active prefill tokens + prompt) in blocks - overlap, 0)
    cost             = adjusted_prefill + blocks of active sequences, the request's own included      lowest wins; ties at random

Defaults: overlap credit 1 without decay, prefill scale 1, request weight 0, temperature 0, prefill tracking on, output blocks not
tracked, device tier only. Active sequences are known from the router's own bookings; each block counts once, however many requests on
the worker share it. With several routers, bookings are told to the others on a best-effort basis, some time later. Source:
Dynamo 1.3-1.6, documentation of the KV router and of its replica synchronisation.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from polyphase.core.ids import Epoch, RequestId, SequenceHash, WorkerId
from polyphase.router import Leg, NaivePrefixIndex, Placement, Route, RouteRequest, WorkerFacts
from polyphase.twin import Timeline
from polyphase.twin.worker import EPOCH
from polyphase.wire.events import BlocksRemoved, BlocksStored, KvEvent, Load


@dataclass(frozen=True)
class Active:
    """One request under way at one worker."""

    worker_id: WorkerId
    hashes: Sequence[SequenceHash]
    prefill_tokens: int  # to be computed when it was routed


class ActiveSequences:
    """What is under way at each worker, as far as this router knows."""

    def __init__(self) -> None:
        self._requests: dict[RequestId, Active] = {}
        self._prefilling: set[RequestId] = set()
        self.blocks: dict[WorkerId, Counter[SequenceHash]] = {}
        self.prefill_tokens: Counter[WorkerId] = Counter()

    def add(self, request_id: RequestId, active: Active) -> None:
        self._requests[request_id] = active
        self._prefilling.add(request_id)
        self.prefill_tokens[active.worker_id] += active.prefill_tokens
        self.blocks.setdefault(active.worker_id, Counter()).update(active.hashes)

    def end_prefill(self, request_id: RequestId) -> None:
        if request_id in self._prefilling:
            self._prefilling.remove(request_id)
            active = self._requests[request_id]
            self.prefill_tokens[active.worker_id] -= active.prefill_tokens

    def remove(self, request_id: RequestId) -> None:
        self.end_prefill(request_id)
        active = self._requests.pop(request_id, None)
        if active is not None:
            counts = self.blocks[active.worker_id]
            for sequence_hash in active.hashes:
                counts[sequence_hash] -= 1
                if not counts[sequence_hash]:
                    del counts[sequence_hash]


class DynamoFormula:
    """Implements `twin.frontend.RoutingCode`."""

    def __init__(self, seed: int = 0) -> None:
        self._index = NaivePrefixIndex()
        self._facts: dict[WorkerId, WorkerFacts] = {}
        self._active = ActiveSequences()
        self._draw = random.Random(seed)
        self.tell_others: Callable[[Callable[[ActiveSequences], None]], None] = lambda change: None

    def upsert_worker(self, facts: WorkerFacts) -> None:
        self._facts[facts.worker_id] = facts

    def apply(self, worker_id: WorkerId, epoch: Epoch, events: list[KvEvent]) -> None:
        for event in events:
            if isinstance(event, BlocksStored):
                self._index.store(worker_id, map(SequenceHash, event.sequence_hashes))
            elif isinstance(event, BlocksRemoved):
                self._index.remove(worker_id, map(SequenceHash, event.sequence_hashes))

    def report_load(self, worker_id: WorkerId, epoch: Epoch, load: Load) -> None:
        """Its own bookings are what counts."""

    def route(self, request: RouteRequest) -> Route:
        overlaps = self._index.match(request.sequence_hashes).as_dict()
        costs = {worker_id: self._cost(worker_id, request, overlaps.get(worker_id, 0)) for worker_id in self._facts}
        lowest = min(costs.values())
        chosen = self._draw.choice([worker_id for worker_id, cost in costs.items() if cost == lowest])
        overlap = overlaps.get(chosen, 0)
        to_compute = max(0, request.prompt_token_count - overlap * self._facts[chosen].block_size)
        active = Active(chosen, request.sequence_hashes, to_compute)
        self._change(lambda sequences: sequences.add(request.request_id, active))
        return Route(request.request_id, Placement(Leg.BOTH, chosen, EPOCH, overlap, ()), None, "")

    def mark_prefill_done(self, request_id: RequestId) -> None:
        self._change(lambda sequences: sequences.end_prefill(request_id))

    def release(self, request_id: RequestId) -> None:
        self._change(lambda sequences: sequences.remove(request_id))

    def hear(self, change: Callable[[ActiveSequences], None]) -> None:
        """Another router booked or released something."""
        change(self._active)

    def _change(self, change: Callable[[ActiveSequences], None]) -> None:
        change(self._active)
        self.tell_others(change)

    def _cost(self, worker_id: WorkerId, request: RouteRequest, overlap: int) -> float:
        block_size = self._facts[worker_id].block_size
        prefill_blocks = (self._active.prefill_tokens[worker_id] + request.prompt_token_count) / block_size
        held = self._active.blocks.get(worker_id, Counter())
        decode_blocks = len(held) + sum(sequence_hash not in held for sequence_hash in request.sequence_hashes)
        return max(prefill_blocks - overlap, 0) + decode_blocks


def synchronised(delay_ns: int) -> Callable[[Timeline], DynamoFormula]:
    """Makes routers that tell each other of their bookings, `delay_ns` later; one after the other, as many as are asked for."""
    made: list[DynamoFormula] = []

    def make(timeline: Timeline) -> DynamoFormula:
        formula = DynamoFormula(seed=len(made))

        def tell_others(change: Callable[[ActiveSequences], None]) -> None:
            for other in made:
                if other is not formula:
                    timeline.after(delay_ns, lambda other=other: other.hear(change))  # type: ignore[misc]

        formula.tell_others = tell_others
        made.append(formula)
        return formula

    return make
