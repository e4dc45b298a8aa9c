"""A fleet in virtual time: workers, frontends with a router each, and a load that is played to its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import xxhash

from polyphase.core.ids import RequestId, WorkerId
from polyphase.engines.mock import MockSettings
from polyphase.engines.mock.assembly import assemble_mock
from polyphase.engines.mock.machine import MockMachine, say_nothing
from polyphase.router import PolicySettings, Router, RouterSettings
from polyphase.twin.frontend import Patience, RoutingCode, SimulatedFrontend
from polyphase.twin.load import Conversation
from polyphase.twin.measures import Measures, RequestRecord, measure
from polyphase.twin.timeline import Timeline
from polyphase.twin.worker import Delays, SimulatedWorker
from polyphase.worker.room import QueueLimits


@dataclass(frozen=True, slots=True)
class FleetSettings:
    engine: MockSettings
    worker_count: int = 16
    frontend_count: int = 1
    delays: Delays = field(default_factory=Delays)
    queue_limits: QueueLimits | None = None  # beyond which workers refuse; None: they take whatever comes
    patience: Patience = field(default_factory=Patience)  # of frontends with refused requests
    longest_stretch: int = 4096  # engine steps played as one while nothing can happen in them; 1: each by itself, same outcome


MakeRouting = Callable[[Timeline], RoutingCode]


def router_of(policy: str) -> MakeRouting:
    """The real router with one of its policies, and no bound on how much may wait: queueing is to be seen, not refused."""
    turns = count()
    return lambda timeline: Router(RouterSettings(PolicySettings(policy), max_waiting_requests=1_000_000, first_turn=7 * next(turns)))


class Fleet:
    """Made for one run. `advance` lets one thing happen, so that the caller can show how far it is."""

    def __init__(self, settings: FleetSettings, make_routing: MakeRouting, load: Sequence[Conversation]) -> None:
        self.timeline = Timeline()
        self.records: list[RequestRecord] = []
        parts = assemble_mock(settings.engine, is_shared=False)  # holds no memory, so that all workers can share it
        names = [WorkerId(f"worker-{number}") for number in range(settings.worker_count)]
        self.workers = {
            name: SimulatedWorker(
                name,
                MockMachine(parts, self.timeline, say_nothing),
                self.timeline,
                settings.delays,
                settings.queue_limits,
                settings.longest_stretch,
            )
            for name in names
        }
        self.frontends = [
            SimulatedFrontend(make_routing(self.timeline), self.workers, self.timeline, settings.delays, settings.patience)
            for _ in range(settings.frontend_count)
        ]
        self._open_count = sum(len(conversation.turns) for conversation in load)
        self.request_count = self._open_count
        for conversation in load:
            self.timeline.at(conversation.start_ns, lambda conversation=conversation: self._ask(conversation, 0))  # type: ignore[misc]

    @property
    def done_count(self) -> int:
        return self.request_count - self._open_count

    def advance(self) -> bool:
        """False: every request has ended."""
        return self._open_count > 0 and self.timeline.step()

    def measures(self) -> Measures:
        busy_ns = [worker.busy_ns for worker in self.workers.values()]
        return measure(self.records, busy_ns, self.timeline.now_ns())

    def _ask(self, conversation: Conversation, number: int) -> None:
        request_id = RequestId(f"r{len(self.records)}")
        frontend = self.frontends[xxhash.xxh3_64_intdigest(request_id.encode()) % len(self.frontends)]  # as a load balancer would

        def go_on() -> None:
            self._open_count -= 1
            if number + 1 < len(conversation.turns):
                self.timeline.after(conversation.turns[number + 1].think_ns, lambda: self._ask(conversation, number + 1))

        self.records.append(frontend.accept(request_id, conversation.turns[number], go_on))


def simulate(
    settings: FleetSettings,
    make_routing: MakeRouting,
    load: Sequence[Conversation],
    on_progress: Callable[[int, int], None] | None = None,
) -> Measures:
    """Play a load to its end. `on_progress` is called with (requests done, requests in all) as they end."""
    fleet = Fleet(settings, make_routing, load)
    done_count = 0
    while fleet.advance():
        if on_progress is not None and fleet.done_count != done_count:
            done_count = fleet.done_count
            on_progress(done_count, fleet.request_count)
    return fleet.measures()
