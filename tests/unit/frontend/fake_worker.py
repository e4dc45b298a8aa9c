"""A worker that speaks the real protocols and computes nothing: it tells the same story to everybody, one token per step.

Token `i` of any answer is token `i` of the story, at whichever worker and in whichever attempt, as with a greedy model. It can be told to
stall, to refuse, to fail, to forget what it owes, and to die.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyphase.runtime import EventPublisher, PeerId, Registry, WorkerPaths, WorkerServer
from polyphase.text import IncrementalDetokenizer, StopStringMatcher, Tokenizer
from polyphase.wire.cards import ModelCard, Role, WorkerEntry, WorkerStatus
from polyphase.wire.events import KvEvent, Load
from polyphase.wire.kv import KvOffer
from polyphase.wire.requests import (
    Answer,
    Cancel,
    FinishReason,
    HandOver,
    PhaseStats,
    Query,
    Question,
    ReleaseLease,
    SequenceOutput,
    StepOutputs,
    Submit,
    TokenLogprob,
    ToWorker,
    WireFailure,
)
from polyphase.wire.transfer import AgentCard, RegionCard

_epochs = itertools.count(1)


@dataclass
class Behaviour:
    """How the worker treats what comes; changed by tests at any time."""

    step_s: float = 0.0
    gate: asyncio.Semaphore | None = None  # each step takes a permit
    is_stalled: bool = False  # takes everything, says nothing
    is_silent: bool = False  # publishes nothing by itself
    refuses: str | None = None  # code of a retryable failure for each submit
    fails_after: int | None = None  # output tokens, then a failure
    failure: WireFailure = field(default_factory=lambda: WireFailure("engine_failed", "the engine raised", True))
    eos_after: int | None = None
    checks_stop_strings: bool = False
    tokens_per_step: int = 1
    cached_tokens: int = 0


class FakeWorker:
    def __init__(
        self,
        run_folder: Path,
        worker_id: str,
        card: ModelCard,
        story: list[int],
        role: Role = Role.BOTH,
        peers: dict[str, FakeWorker] | None = None,
        labels: dict[str, str] | None = None,
        **entry: Any,
    ) -> None:
        self.worker_id = worker_id
        self.card = card
        self.story = story
        self.behaviour = Behaviour()
        self.epoch = next(_epochs)
        self.submits: list[Submit] = []
        self.cancels: list[str] = []
        self.released: list[str] = []
        self.leases: set[str] = set()
        self.running: dict[str, asyncio.Task[None]] = {}
        self._peers = peers if peers is not None else {}
        self._peers[worker_id] = self
        paths = WorkerPaths.of(run_folder, worker_id)
        paths.request_socket.parent.mkdir(mode=0o700, exist_ok=True)
        self.entry = WorkerEntry(
            worker_id=worker_id,
            epoch=self.epoch,
            role=role,
            model=card.name,
            pid=1,
            host="localhost",
            request_endpoint=paths.request_endpoint,
            event_endpoint=paths.event_endpoint,
            labels=labels or {},
            **entry,
        )
        self._server = WorkerServer(paths.request_endpoint, self._on_message)
        self._publisher = EventPublisher(paths.event_endpoint, worker_id, self.epoch)
        self._registry = Registry(run_folder)
        self._tasks: list[asyncio.Task[None]] = []
        self._step = 0

    async def start(self) -> None:
        self._tasks.append(asyncio.create_task(self._server.run()))
        self._lease = self._registry.announce(self.entry)
        self._tasks.append(asyncio.create_task(self._lease.renew()))
        self._tasks.append(asyncio.create_task(self._beat()))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(1)
            if not self.behaviour.is_silent:
                self.publish()

    def update(self, entry: WorkerEntry) -> None:
        self.entry = entry
        self._lease.update(entry)

    async def die(self) -> None:
        """Gone at once, without a word: as after kill -9, the lease is all that tells."""
        for task in [*self._tasks, *self.running.values()]:
            task.cancel()
        await asyncio.gather(*self._tasks, *self.running.values(), return_exceptions=True)
        self._tasks.clear()
        self.running.clear()
        self._server._pump.detach()
        self._server._socket.close(linger=0)
        self._publisher.close()
        self._lease.withdraw()
        self._peers.pop(self.worker_id, None)

    def publish(self, events: list[KvEvent] | None = None, load: Load | None = None) -> None:
        self._publisher.publish(events or [], load or Load(block_count=self.card.block_count))

    def _on_message(self, peer: PeerId, message: ToWorker) -> None:
        match message:
            case Submit():
                self.submits.append(message)
                self.running[message.request_id] = asyncio.create_task(self._serve(peer, message))
            case Cancel(request_id):
                self.cancels.append(request_id)
                self.leases.discard(f"lease-{request_id}")
                task = self.running.pop(request_id, None)
                if task is not None:
                    task.cancel()
                    self._step -= 1  # it takes no step
                    self._send(peer, SequenceOutput(request_id=request_id, finish_reason=FinishReason.CANCELLED))
            case HandOver(request_id):
                task = self.running.pop(request_id, None)
                if task is not None:
                    task.cancel()
                    submit = next(s for s in self.submits if s.request_id == request_id)
                    offer = self._offer(submit)
                    self._send(peer, SequenceOutput(request_id=request_id, finish_reason=FinishReason.HANDED_OVER, offer=offer))
            case ReleaseLease(lease_id):
                self.released.append(lease_id)
                self.leases.discard(lease_id)
            case Query(query_id, Question.CARD):
                self._server.send(peer, Answer(query_id, self.card))
            case Query(query_id, Question.SNAPSHOT, cursor):
                self._server.send(peer, Answer(query_id, self._publisher.source.page(cursor)))
            case Query(query_id, Question.BATCHES, _, after):
                self._server.send(peer, Answer(query_id, self._publisher.source.missed(after)))
            case Query(query_id, Question.STATUS):
                status = WorkerStatus(entry=self.entry, load=Load(), uptime_s=1.0, rss_bytes=1)
                self._server.send(peer, Answer(query_id, status))
            case _:
                pass

    def _send(self, peer: PeerId, *outputs: SequenceOutput) -> None:
        self._step += 1
        self._server.send(peer, StepOutputs(self.worker_id, self.epoch, self._step, list(outputs)))

    async def _serve(self, peer: PeerId, submit: Submit) -> None:
        try:
            await self._tell(peer, submit)
        finally:
            if self.running.get(submit.request_id) is asyncio.current_task():
                del self.running[submit.request_id]

    async def _tell(self, peer: PeerId, submit: Submit) -> None:
        behaviour, request_id = self.behaviour, submit.request_id
        if behaviour.refuses is not None:
            failure = WireFailure(behaviour.refuses, f"{self.worker_id} refuses", True)
            self._send(peer, SequenceOutput(request_id=request_id, finish_reason=FinishReason.ERROR, failure=failure))
            return
        if behaviour.is_stalled:
            await asyncio.Event().wait()
        stats: PhaseStats | None = self._stats(submit)
        matcher = _Stops(self.card, submit) if behaviour.checks_stop_strings and submit.stop.stop_strings else None
        count = len(submit.token_ids) - submit.prompt_token_count
        while True:
            await asyncio.sleep(behaviour.step_s)
            if behaviour.gate is not None:
                await behaviour.gate.acquire()
            if behaviour.fails_after is not None and count >= behaviour.fails_after:
                self._send(peer, SequenceOutput(request_id=request_id, finish_reason=FinishReason.ERROR, failure=behaviour.failure))
                return
            ids: list[int] = []
            finish: FinishReason | None = None
            stop_reason: int | str | None = None
            while finish is None and len(ids) < (1 if submit.hand_over else behaviour.tokens_per_step):
                is_eos = behaviour.eos_after == count and not submit.stop.ignore_eos
                token_id = self.card.eos_token_ids[0] if is_eos else self.story[count % len(self.story)]
                ids.append(token_id)
                count += 1
                if is_eos:
                    finish = FinishReason.STOP
                elif token_id in submit.stop.stop_token_ids:
                    finish, stop_reason = FinishReason.STOP, token_id
                elif matcher is not None and (matched := matcher.push(token_id)):
                    finish, stop_reason = FinishReason.STOP, matched
                elif count >= submit.stop.max_tokens:
                    finish = FinishReason.LENGTH
            offer = None
            if finish is None and submit.hand_over:
                finish, offer = FinishReason.HANDED_OVER, self._offer(submit)
            self._send(
                peer,
                SequenceOutput(
                    request_id=request_id,
                    token_ids=ids,
                    logprobs=_logprobs(ids, submit.sampling.top_logprobs),
                    finish_reason=finish,
                    stop_reason=stop_reason,
                    stats=stats,
                    offer=offer,
                ),
            )
            stats = None
            if finish is not None:
                return

    def _stats(self, submit: Submit) -> PhaseStats:
        if submit.offer is None:
            return PhaseStats(cached_token_count=self.behaviour.cached_tokens)
        owner = self._peers.get(submit.offer.worker_id)
        if owner is not None:
            owner.leases.discard(submit.offer.lease_id)
        return PhaseStats(transferred_token_count=submit.offer.token_count, transferred_bytes=4096, transfer_ms=1.5)

    def _offer(self, submit: Submit) -> KvOffer:
        lease_id = f"lease-{submit.request_id}"
        self.leases.add(lease_id)
        region = RegionCard("pool", "host", 8, 1024, [])
        agent = AgentCard(self.worker_id, self.epoch, "host", 0, "/nowhere", "", False, [], [region])
        endpoint = self.entry.request_endpoint
        return KvOffer(self.worker_id, self.epoch, endpoint, lease_id, 2**62, agent, "pool", [0], [1], len(submit.token_ids))


class _Stops:
    def __init__(self, card: ModelCard, submit: Submit) -> None:
        self._detokenizer = IncrementalDetokenizer(Tokenizer.from_json(card.tokenizer_json), submit.token_ids)
        self._matcher = StopStringMatcher(submit.stop.stop_strings)

    def push(self, token_id: int) -> str | None:
        return self._matcher.push(self._detokenizer.push([token_id]))[1]


def _logprobs(ids: list[int], top: int | None) -> list[TokenLogprob] | None:
    if top is None:
        return None
    return [TokenLogprob(i, -0.5, [(i, -0.5), (i + 1, -1.5), (i + 2, -2.5)][:top]) for i in ids]
