"""Any order of joins, deaths, events, routes and ends leaves the router consistent, and its answers within the rules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import takewhile

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from polyphase.core.errors import NoWorkers, Overloaded
from polyphase.core.ids import Epoch, RequestId, SequenceHash, WorkerId
from polyphase.router import Router, RouterSettings, SplitRule, WorkerFacts
from polyphase.router.groups import mates_of
from polyphase.wire.cards import Role
from polyphase.wire.events import AllCleared, BlocksRemoved, BlocksStored, Load
from tests.unit.router.builders import facts, prefix, request

NAMES = st.sampled_from(["a", "b", "c", "d"])
REQUESTS = st.sampled_from([str(number) for number in range(8)])
PROMPTS = st.builds(prefix, st.integers(1, 3), st.integers(0, 30))
EPOCHS = st.integers(1, 3)
GROUPS = st.tuples(st.sampled_from(["", "g"]), st.sampled_from([None, 0.0, 1.0, 3.0]))
ADAPTERS = st.sampled_from(["sql"])


def common(hashes: list[SequenceHash], known: set[SequenceHash]) -> int:
    """Leading blocks that are known."""
    return len(list(takewhile(known.__contains__, hashes)))


class RouterMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        settings_ = RouterSettings(split=SplitRule(min_uncached_tokens=64), max_waiting_requests=2)
        self.router = Router(settings_)
        self.workers: dict[str, WorkerFacts] = {}
        self.held: dict[str, set[SequenceHash]] = {}
        self.placed: dict[str, set[str]] = {}  # request → workers that it is booked on
        # request → where its prompt is on its way, the prompt, and how much of it was there already
        self.expected: dict[str, tuple[str, list[SequenceHash], int]] = {}

    @rule(name=NAMES, role=st.sampled_from(Role), epoch=EPOCHS, is_draining=st.booleans(), group=GROUPS, adapters=st.sets(ADAPTERS))
    def upsert(self, name: str, role: Role, epoch: int, is_draining: bool, group: tuple[str, float | None], adapters: set[str]) -> None:
        plain = facts(name, role, epoch=epoch, is_draining=is_draining, max_running=1)
        worker = replace(plain, group=group[0], weight=group[1], adapters=frozenset(adapters))
        self.router.upsert_worker(worker)
        known = self.workers.get(name)
        if known is None or epoch > known.epoch:
            self.forget(name)
            self.held[name] = set()
        if known is None or epoch >= known.epoch:
            self.workers[name] = worker

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        self.router.remove_worker(WorkerId(name))
        self.workers.pop(name, None)
        self.held.pop(name, None)
        self.forget(name)

    @rule(name=NAMES, epoch=EPOCHS, hashes=PROMPTS, kind=st.sampled_from(["replace", "store", "remove", "clear"]))
    def change_blocks(self, name: str, epoch: int, hashes: list[SequenceHash], kind: str) -> None:
        worker_id, life = WorkerId(name), Epoch(epoch)
        if kind == "replace":
            self.router.replace_blocks(worker_id, life, hashes)
        else:
            events = {"store": BlocksStored(list(hashes)), "remove": BlocksRemoved(list(hashes)), "clear": AllCleared()}
            self.router.apply(worker_id, life, [events[kind]])
        if name in self.workers and self.workers[name].epoch == epoch:
            held = self.held[name]
            self.held[name] = {
                "replace": set(hashes),
                "store": held | set(hashes),
                "remove": held - set(hashes),
                "clear": set[SequenceHash](),
            }[kind]

    @rule(name=NAMES, epoch=EPOCHS, waiting=st.integers(0, 500), used=st.integers(0, 50))
    def report(self, name: str, epoch: int, waiting: int, used: int) -> None:
        self.router.report_load(WorkerId(name), Epoch(epoch), Load(waiting_prefill_tokens=waiting, used_block_count=used))

    @rule(request_id=REQUESTS, hashes=PROMPTS, rest=st.integers(0, 15), excluded=st.sets(NAMES, max_size=3), adapter=st.none() | ADAPTERS)
    def route(self, request_id: str, hashes: list[SequenceHash], rest: int, excluded: set[str], adapter: str | None) -> None:
        asked = replace(request(request_id, hashes, tokens=len(hashes) * 16 + rest, excluded=tuple(excluded)), adapter=adapter)
        candidates = [worker for worker in self.workers.values() if not worker.is_draining and worker.worker_id not in excluded]
        candidates = [worker for worker in candidates if adapter is None or adapter in worker.adapters]
        self.placed.pop(request_id, None)
        self.expected.pop(request_id, None)
        try:
            route = self.router.route(asked)
        except NoWorkers:
            assert not candidates
            return
        except Overloaded:
            assert candidates
            return
        chosen = [route.decode] + ([route.prefill] if route.prefill else [])
        for placement in chosen:
            worker = self.workers[placement.worker_id]
            assert worker in candidates
            assert placement.epoch == worker.epoch
            usable = hashes[: max(asked.prompt_token_count - 1, 0) // 16]
            assert placement.overlap_block_count == self.depth(placement.worker_id, usable)
            assert placement.candidates[0].worker_id == placement.worker_id
        decoder = self.workers[route.decode.worker_id]
        if route.prefill:
            assert self.workers[route.prefill.worker_id].role is Role.PREFILL
            assert mates_of(self.workers[route.prefill.worker_id]) == mates_of(decoder)
        if decoder.role is Role.PREFILL:
            assert all(worker.role is Role.PREFILL for worker in candidates)
        self.placed[request_id] = {placement.worker_id for placement in chosen}
        prompt_worker = chosen[-1].worker_id
        usable = hashes[: max(asked.prompt_token_count - 1, 0) // 16]
        self.expected[request_id] = (prompt_worker, hashes, common(usable, self.held[prompt_worker]))

    @rule(request_id=REQUESTS)
    def end_prefill(self, request_id: str) -> None:
        self.router.mark_prefill_done(RequestId(request_id))
        self.expected.pop(request_id, None)

    @rule(request_id=REQUESTS)
    def release(self, request_id: str) -> None:
        self.router.release(RequestId(request_id))
        self.placed.pop(request_id, None)
        self.expected.pop(request_id, None)

    @invariant()
    def consistent(self) -> None:
        self.router.bookings.check()
        assert [view.facts for view in self.router.workers()] == [self.workers[name] for name in sorted(self.workers)]
        if not self.placed:
            assert self.router.bookings.total().is_zero()

    def teardown(self) -> None:
        for request_id in self.placed:
            self.router.release(RequestId(request_id))
        assert self.router.bookings.total().is_zero()

    def depth(self, name: str, hashes: Iterable[SequenceHash]) -> int:
        """Of the prompt's leading blocks, those that the worker holds, or is going to hold because of one request."""
        hashes = list(hashes)
        coming = [(common(hashes, set(others)), held) for worker, others, held in self.expected.values() if worker == name]
        return max([common(hashes, self.held[name]), *(depth for depth, held in coming if depth > held)])

    def forget(self, name: str) -> None:
        self.placed = {request_id: names - {name} for request_id, names in self.placed.items() if names - {name}}
        self.expected = {request_id: there for request_id, there in self.expected.items() if there[0] != name}


RouterMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRouterStates = RouterMachine.TestCase
