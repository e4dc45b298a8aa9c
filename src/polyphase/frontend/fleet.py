"""Who is there: turns the registry's news and the workers' event streams into what the router and the dispatcher know.

registry ─► Joined ─ connect ─ ask for the card ─ same model as the others? ─► models, router, event stream
            Updated (role, draining) ───────────────────────────────────────► router, then what should move is moved
            Left, or its process is seen dying ─────────────────────────────► router, models; a moment later the dispatcher
connection cut ─► a moment later: connect anew ─────────────────────────────► dispatcher
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Protocol, cast

from polyphase.core.errors import ConfigurationError, WorkerLost
from polyphase.core.ids import Epoch, SequenceHash, WorkerId
from polyphase.frontend.dispatch import Dispatcher
from polyphase.frontend.fleet_watch import FleetWatch
from polyphase.frontend.models import Models, ServedModel, identity_of, without_tokenizer
from polyphase.frontend.predictions import CHECK_INTERVAL_S
from polyphase.frontend.settings import FrontendSettings
from polyphase.router import Router, WorkerFacts
from polyphase.runtime import AskedHistory, DeathWatch, EventSubscriber, Joined, Left, RegistryChange, StreamView, Updated, WorkerClient
from polyphase.wire.cards import ModelCard, WorkerEntry
from polyphase.wire.events import Digests, KvEvent, Load, Tier
from polyphase.wire.requests import Question, StepOutputs, ToWorker

log = logging.getLogger(__name__)

LAST_WORDS_S = 0.005  # what a worker sent before it went may still be on its way here; what comes later is computed again
CUT_PATIENCE_S = 0.02  # in which the registry tells that it was a death
CARD_RETRY_S = 0.5


class RegistrySource(Protocol):
    def watch(self) -> AsyncIterator[RegistryChange]: ...


class Fleet:
    """Implements `runtime.EventSink`. `send` is the dispatcher's way to the workers."""

    def __init__(self, registry: RegistrySource, router: Router, models: Models, settings: FrontendSettings) -> None:
        self._registry = registry
        self._router = router
        self._models = models
        self._settings = settings
        self._client = WorkerClient(self._on_outputs, name="frontend", on_cut=self._on_cut)
        self._subscriber = EventSubscriber(self, AskedHistory(self._client))
        self._entries: dict[str, WorkerEntry] = {}
        self._cards: dict[str, ModelCard] = {}  # of those that were admitted
        self._turned_away: dict[str, str] = {}  # why others were not
        self._leaving: dict[str, tuple[Epoch, asyncio.TimerHandle]] = {}
        self._deaths = DeathWatch(self._on_death, self._is_busy)
        self._dispatcher: Dispatcher | None = None
        self._watch: FleetWatch | None = None

    def send(self, worker_id: str, message: ToWorker) -> None:
        """Raises: WorkerLost."""
        self._client.send(worker_id, message)
        if self._watch is not None:
            self._watch.note_sent(worker_id, message)

    def streams(self) -> dict[str, StreamView]:
        return self._subscriber.streams()

    def turned_away(self) -> dict[str, str]:
        """By worker id: why it gets no requests although it is there."""
        return dict(self._turned_away)

    async def run(self, dispatcher: Dispatcher) -> None:
        """Follow the registry until cancelled; then all connections are closed."""
        self._dispatcher = dispatcher
        self._watch = FleetWatch(self._router, dispatcher, self._settings)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._client.run(), name="request-channel")
                tasks.create_task(self._subscriber.run(), name="event-stream")
                tasks.create_task(self._check_predictions(dispatcher), name="predictions")
                tasks.create_task(self._watch.run(), name="fleet-watch")
                tasks.create_task(self._deaths.run(), name="deaths")
                async for change in self._registry.watch():
                    self._on_change(change, tasks)
        finally:
            for _, timer in self._leaving.values():
                timer.cancel()
            self._deaths.close()
            self._client.close()
            self._subscriber.close()

    def _on_change(self, change: RegistryChange, tasks: asyncio.TaskGroup) -> None:
        match change:
            case Joined(entry):
                self._forget(entry.worker_id)
                self._entries[entry.worker_id] = entry
                self._deaths.watch(entry.worker_id, entry.pid, entry.began_ticks)
                self._turned_away.pop(entry.worker_id, None)
                tasks.create_task(self._admit(entry), name=f"admit-{entry.worker_id}")
            case Updated(entry) if self._is_current(entry):
                self._entries[entry.worker_id] = entry
                card = self._cards.get(entry.worker_id)
                before = self._router.facts_of(WorkerId(entry.worker_id))
                if card is not None and before is not None:
                    after = _facts(entry, card)
                    self._router.upsert_worker(after)
                    assert self._watch is not None
                    self._watch.changed(before, after)
            case Left(worker_id, epoch):
                entry_or_none = self._entries.get(worker_id)
                if entry_or_none is not None and entry_or_none.epoch == epoch:
                    self._leave(worker_id, Epoch(epoch))

    async def _admit(self, entry: WorkerEntry) -> None:
        """Connect to a new worker and, once its card fits, let requests go there."""
        worker_id = entry.worker_id
        try:
            self._client.connect(worker_id, entry.request_endpoint)
            card = await self._card_of(entry)
            if card is None:
                return
            identity = await asyncio.to_thread(identity_of, card)
            model = self._models.known(card.name, identity)
            if model is None:
                model = await asyncio.to_thread(ServedModel.of, card, identity)
            if not self._is_current(entry):
                return
            if card.name != entry.model:
                raise ConfigurationError(f"worker {worker_id} announces the model {entry.model!r} and hands out a card of {card.name!r}")
            self._models.add_worker(worker_id, model, card, entry.aliases)
        except (ConfigurationError, WorkerLost) as error:
            log.error("worker %s gets no requests: %s", worker_id, error.message)
            self._turn_away(entry, error.message)
            return
        except Exception as error:  # the root of this task: one odd worker must not end the frontend
            log.exception("worker %s gets no requests", worker_id)
            self._turn_away(entry, f"{type(error).__name__}: {error}")
            return
        assert self._dispatcher is not None
        self._cards[worker_id] = without_tokenizer(card)
        self._dispatcher.worker_joined(WorkerId(worker_id), Epoch(entry.epoch), entry.request_endpoint)
        facts = _facts(self._entries[worker_id], card)
        self._router.upsert_worker(facts)
        if self._router.follows_events(facts):
            self._dispatcher.predictions.worker_joined(facts)
        assert self._watch is not None
        self._watch.joined(facts)
        self._subscriber.connect(entry)
        log.info("worker %s joined: %s, role %s", worker_id, entry.model, entry.role.value)

    def _turn_away(self, entry: WorkerEntry, reason: str) -> None:
        if self._is_current(entry):
            self._turned_away[entry.worker_id] = reason

    async def _card_of(self, entry: WorkerEntry) -> ModelCard | None:
        """Asked again until it comes or the worker goes; None in the latter case."""
        while self._is_current(entry):
            try:
                card = await self._client.ask(entry.worker_id, Question.CARD, self._settings.card_timeout_s)
            except WorkerLost as error:
                log.warning("no model card yet: %s", error.message)
                await asyncio.sleep(CARD_RETRY_S)
                continue
            if isinstance(card, ModelCard):
                return card
            raise ConfigurationError(f"worker {entry.worker_id} answered the question for its card with {type(card).__name__}")
        return None

    def _is_current(self, entry: WorkerEntry) -> bool:
        known = self._entries.get(entry.worker_id)
        return known is not None and known.epoch == entry.epoch

    def _leave(self, worker_id: str, epoch: Epoch) -> None:
        """No request goes there from now on; what runs there is given up when its last words have had time to arrive."""
        log.warning("worker %s left", worker_id)
        self._deaths.forget(worker_id)
        del self._entries[worker_id]
        self._cards.pop(worker_id, None)
        self._turned_away.pop(worker_id, None)
        self._router.remove_worker(WorkerId(worker_id))
        self._models.remove_worker(worker_id)
        assert self._dispatcher is not None
        self._dispatcher.predictions.worker_left(WorkerId(worker_id))
        if self._watch is not None:
            self._watch.left(WorkerId(worker_id))
        self._subscriber.disconnect(worker_id)
        timer = asyncio.get_running_loop().call_later(LAST_WORDS_S, self._forget, worker_id)
        self._leaving[worker_id] = (epoch, timer)

    def _forget(self, worker_id: str) -> None:
        leaving = self._leaving.pop(worker_id, None)
        if leaving is None:
            return
        epoch, timer = leaving
        timer.cancel()
        self._client.disconnect(worker_id)
        assert self._dispatcher is not None
        self._dispatcher.worker_lost(WorkerId(worker_id), epoch)

    def _on_death(self, worker_id: str) -> None:
        """Its process is dying; the registry will tell the same when the kernel is done with it."""
        self._leave(worker_id, Epoch(self._entries[worker_id].epoch))

    def _is_busy(self) -> bool:
        return self._dispatcher is not None and self._dispatcher.active_count > 0

    def _on_cut(self, worker_id: str) -> None:
        """It died, which registry or process table are about to tell; or only the connection broke."""
        self._deaths.look()
        entry = self._entries.get(worker_id)
        if entry is not None:
            asyncio.get_running_loop().call_later(CUT_PATIENCE_S, self._reconnect, entry)

    def _reconnect(self, entry: WorkerEntry) -> None:
        """As another peer, so that the worker aborts what it still does for the earlier one: nobody knows what of it has arrived."""
        if not self._is_current(entry) or entry.worker_id not in self._cards or self._dispatcher is None:
            return
        log.warning("the connection to worker %s broke; what it has goes on elsewhere, or there once more", entry.worker_id)
        try:
            self._client.connect(entry.worker_id, entry.request_endpoint)
        except WorkerLost as error:
            log.warning("%s", error.message)
        self._dispatcher.connection_lost(WorkerId(entry.worker_id), Epoch(entry.epoch))

    def _on_outputs(self, outputs: StepOutputs) -> None:
        assert self._dispatcher is not None
        if self._watch is not None:
            self._watch.note_outputs(outputs)
        self._dispatcher.on_outputs(outputs)

    async def _check_predictions(self, dispatcher: Dispatcher) -> None:
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            dispatcher.predictions.check(self._repair_count)

    def _repair_count(self, worker_id: str) -> int:
        counts = self._subscriber.counts(worker_id)
        return counts.gaps + counts.drifts

    # runtime.EventSink

    def on_reset(self, worker_id: str, epoch: int) -> None:
        self._router.replace_blocks(WorkerId(worker_id), Epoch(epoch), ())

    def on_held(self, worker_id: str, epoch: int, tier: Tier, hashes: Sequence[int]) -> None:
        self._router.add_blocks(WorkerId(worker_id), Epoch(epoch), cast("Sequence[SequenceHash]", hashes), tier)

    def digests(self, worker_id: str, epoch: int) -> Digests | None:
        return self._router.digests(WorkerId(worker_id), Epoch(epoch))

    def on_events(self, worker_id: str, epoch: int, events: list[KvEvent]) -> None:
        self._router.apply(WorkerId(worker_id), Epoch(epoch), events)
        assert self._dispatcher is not None
        self._dispatcher.predictions.note_events(WorkerId(worker_id), events)

    def on_load(self, worker_id: str, epoch: int, load: Load) -> None:
        self._router.report_load(WorkerId(worker_id), Epoch(epoch), load)
        assert self._dispatcher is not None
        self._dispatcher.predictions.note_load(WorkerId(worker_id), load)
        if self._watch is not None:
            self._watch.note_load(WorkerId(worker_id), load)
        self._dispatcher.worker_reported(WorkerId(worker_id))


def _facts(entry: WorkerEntry, card: ModelCard) -> WorkerFacts:
    return WorkerFacts(
        worker_id=WorkerId(entry.worker_id),
        epoch=Epoch(entry.epoch),
        model=entry.model,
        role=entry.role,
        block_size=card.block_size,
        block_count=card.block_count,
        max_batch_tokens=card.max_batch_tokens,
        max_running=card.max_running,
        can_hand_over=card.can_hand_over,
        takes_grammars=card.takes_grammars,
        resumes_grammars=card.takes_grammars and card.resumes_grammars,
        publishes_events=card.publishes_events,
        passes=frozenset(card.passes),
        engine=card.engine,
        group=entry.group or card.engine,
        weight=entry.weight,
        adapters=frozenset(card.adapters),
        context_length=card.context_length or None,
        is_draining=entry.is_draining,
        is_asleep=entry.is_asleep,
        labels=entry.labels,
        offer_kind=card.offer_kind,
        serves_whole=card.serves_whole,
        offer_facts=card.offer_facts,
    )
