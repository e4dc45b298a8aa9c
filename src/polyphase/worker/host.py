"""Ties one engine to the world: the request channel, the event stream, the registry, other workers' block pools.

    peer ── Submit ──► handle ──► engine.submit          engine ── StepReport ──► on_step ──► one StepOutputs per peer
                        │                                                           ├──► event stream: KV events, load
                        └─ offer: pull its blocks first                              └──► leases of copied offers released

Everything here runs on one event loop, shares the interpreter with the engine's thread, and so does little per step. Every request is
answered for good exactly once: by the engine's last output, or by an error of the worker's own when the engine refused it, the worker
drains, or the engine broke.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass

import msgspec

from polyphase.core.errors import (
    DeadlineExceeded,
    Draining,
    EngineFailed,
    InvalidRequest,
    Lost,
    Overloaded,
    PolyphaseError,
    Refused,
    WorkerLost,
)
from polyphase.core.ids import ContentKey
from polyphase.engines.interface import BlockSource, Engine, StepReport, abilities_of
from polyphase.observe import request_context, rss_bytes, uptime_s
from polyphase.runtime import EventPublisher, Lease, PeerId, WorkerPaths, WorkerServer
from polyphase.transfer import Agent, LeaseEnd, Region
from polyphase.wire.cards import Role, WorkerEntry, WorkerStatus
from polyphase.wire.events import KvEvent, Load
from polyphase.wire.kv import EngineOffer, KvOffer, Offer
from polyphase.wire.requests import (
    Answer,
    Cancel,
    Denied,
    Drain,
    FindBlocks,
    FinishReason,
    Forward,
    HandOver,
    HeldBlocks,
    PullAhead,
    Query,
    Question,
    ReadOn,
    ReleaseLease,
    SequenceOutput,
    Submit,
    SwitchRole,
    SwitchSleep,
    ToWorker,
    WireFailure,
)
from polyphase.worker.engines import forwarder, kv_exporter, kv_importer, kv_sender, sleeper
from polyphase.worker.holders import Holders
from polyphase.worker.lease_release import LeaseReleases
from polyphase.worker.live import LiveRequest, LiveRequests
from polyphase.worker.outbox import Outbox
from polyphase.worker.pulls_ahead import PullsAhead
from polyphase.worker.roles import refuse_misdirected, why_not_switch
from polyphase.worker.room import QueueLimits
from polyphase.worker.sleep import Sleep
from polyphase.worker.sources import OfferSources

log = logging.getLogger(__name__)

HEARTBEAT_INTERVAL_S = 1.0
LOAD_INTERVAL_S = 0.1  # between load reports while steps change nothing but token counts
ACCEPT_LOAD_INTERVAL_S = 0.005  # between those that only tell of requests accepted; other frontends should know before a long step ends
DRAIN_CHECK_INTERVAL_S = 0.05
DEADLINE_GRACE_S = 0.25  # the peer, which set the deadline, cancels by itself; this is for when it cannot


@dataclass(frozen=True, slots=True)
class HostSettings:
    entry: WorkerEntry
    paths: WorkerPaths
    drain_timeout_s: float
    agent: Agent  # stays the caller's
    region: Region | None  # the engine's blocks, registered with it; None: nobody can read them
    limits: QueueLimits | None = None  # None: the engine alone refuses
    early_events: tuple[KvEvent, ...] = ()  # from before there was a stream


class WorkerHost:
    """One life of a worker. `run` serves until drained; then everything that it took is given back, but for the engine."""

    def __init__(self, engine: Engine, lease: Lease, settings: HostSettings) -> None:
        """Binds the sockets. Raises: ConfigurationError if one cannot be bound."""
        self._engine = engine
        self._exporter = kv_exporter(engine)
        able = sleeper(engine)
        self._sleep = Sleep(able, self._is_busy, self._tell_asleep) if able is not None else None
        self._lender = self._exporter or kv_sender(engine)
        self._forwarder = forwarder(engine)
        self._lease = lease
        self._settings = settings
        self._entry = settings.entry
        self._live = LiveRequests()
        self._last_load_s = 0.0
        self._tasks = asyncio.TaskGroup()
        self._agent = settings.agent
        self._region = settings.region
        self._sources = OfferSources(settings.agent)
        importer = kv_importer(engine)
        self._ahead: PullsAhead | None = None
        if self._exporter is not None and importer is not None and settings.region is not None:
            self._ahead = PullsAhead(self._exporter, importer, self._sources)
        self._holders = Holders(self._entry.worker_id)
        self._releases = LeaseReleases(self._entry.worker_id)
        self._draining = asyncio.Event()
        with contextlib.ExitStack() as stack:
            stack.callback(settings.paths.remove)
            self._server = WorkerServer(self._entry.request_endpoint, self._handle)
            stack.callback(self._server.close)
            self._outbox = Outbox(self._server, self._entry.worker_id, self._entry.epoch)
            self._publisher = EventPublisher(self._entry.event_endpoint, self._entry.worker_id, self._entry.epoch)
            stack.callback(self._publisher.close)
            stack.callback(self._releases.close)
            stack.callback(self._holders.close)
            if self._ahead is not None:
                stack.callback(self._ahead.close)
            stack.callback(self._sources.close)
            self._closing = stack.pop_all()

    def drain(self) -> None:
        """Accept nothing new, finish what runs, then leave. Returns at once; `run` returns when done."""
        if not self._draining.is_set():
            self._draining.set()
            log.info("draining: %d requests to finish within %.0f s", len(self._live), self._settings.drain_timeout_s)
            self._entry = msgspec.structs.replace(self._entry, is_draining=True)
            try:
                self._lease.update(self._entry)
            except OSError as error:  # the run folder may be gone with the supervisor
                log.warning("the registry cannot be told: %s", error)

    async def run(self) -> None:
        """Serve until drained, or until something breaks: then that exception, after the peers were told."""
        failure: Lost = WorkerLost(f"worker {self._entry.worker_id} ended before the request was done")
        try:
            async with self._tasks as tasks:
                parts = {
                    "server": self._server.run(),
                    "engine": self._engine.run(self._on_step),
                    "heartbeat": self._beat(),
                    "holders": self._holders.run(),
                    "releases": self._releases.run(),
                    "lease": self._lease.renew(),
                }
                running = [tasks.create_task(part, name=name) for name, part in parts.items()]
                self._publisher.publish(list(self._settings.early_events), self._engine.load())
                self._lease.publish(self._entry)
                log.info("ready: serving %s as %s worker", self._entry.model, self._entry.role)
                await self._until_drained()
                self._fail_all(failure)
                for task in running:
                    task.cancel()
        except BaseExceptionGroup as group:
            told = engine_failure(group)
            why = f": {told.message}" if told is not None else ""
            failure = EngineFailed(f"worker {self._entry.worker_id} broke down{why}")
            raise
        finally:
            self._fail_all(failure)
            self._lease.withdraw()
            self._closing.close()

    async def _until_drained(self) -> None:
        """Wait for a drain to be asked for, then for the last request and the last lease, but no longer than the drain's time."""
        await self._draining.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_timeout_s):
                while self._is_busy():  # noqa: ASYNC110  leases end by time, without an event
                    await asyncio.sleep(DRAIN_CHECK_INTERVAL_S)

    # From peers

    def _handle(self, peer: PeerId, message: ToWorker) -> None:
        match message:
            case Submit():
                self._accept(peer, message)
            case Forward():
                self._accept_forward(peer, message)
            case ReadOn():
                if self._forwarder is not None and self._is_own(peer, message.request_id):
                    self._forwarder.read_on(message.request_id, message.byte_count)
            case PullAhead():
                if self._ahead is not None and not self._draining.is_set():
                    self._ahead.add(message)
            case Cancel():
                self._cancel(peer, message.request_id)
            case HandOver():
                self._hand_over(peer, message.request_id)
            case SwitchRole():
                self._switch_role(peer, message)
            case ReleaseLease():
                if self._lender is not None:
                    self._lender.release_lease(message.lease_id)
                    self._publish(None)  # no step may follow to tell of it
            case SwitchSleep():
                self._tasks.create_task(self._switch_sleep(peer, message), name="sleep")
            case Query():
                self._answer(peer, message)
            case FindBlocks():
                self._server.send(peer, Answer(message.query_id, self._find_blocks(message)))
            case Drain():
                self.drain()

    def _accept(self, peer: PeerId, request: Submit) -> None:
        request_id = request.request_id
        try:
            self._refuse_at_the_door(request_id)
            refuse_misdirected(request, self._entry)
        except (Refused, InvalidRequest) as refusal:
            self._refuse(peer, request, refusal)
            return
        live = self._live.add(request_id, peer, wants_hand_over=request.hand_over)
        if request.remaining_ms is not None:
            self._live.end_by(live, time.monotonic() + request.remaining_ms / 1e3 + DEADLINE_GRACE_S)
        has_blocks_elsewhere = isinstance(request.offer, KvOffer) or (
            request.offer is None and request.holder is not None and self._ahead is not None
        )
        if not has_blocks_elsewhere:
            self._submit(request, None)
            return
        try:
            if self._settings.limits is not None:  # before blocks travel for nothing
                self._settings.limits.refuse_if_full(request, self._engine.load())
        except Refused as refusal:
            self._live.remove(request_id)
            self._refuse(peer, request, refusal)
            return
        live.offer = request.offer  # until the engine has it, whatever happens gives it back
        fetch = self._pull_and_submit if request.offer is None else self._open_and_submit
        live.opening = self._tasks.create_task(fetch(live, request), name=f"open-{request_id}")

    async def _pull_and_submit(self, live: LiveRequest, request: Submit) -> None:
        """Cancel: as `_open_and_submit`."""
        assert self._ahead is not None
        assert request.holder is not None
        try:
            await self._ahead.pull_held(request, request.holder, self._holders)
            live.opening = None
            self._submit(request, None)
        finally:
            self._ahead.forget(request.request_id)

    def _accept_forward(self, peer: PeerId, request: Forward) -> None:
        try:
            self._refuse_at_the_door(request.request_id)
            if self._forwarder is None or not set(request.kinds) <= set(self._engine.card.passes):
                raise InvalidRequest(f"the engine of worker {self._entry.worker_id} does not take {', '.join(request.kinds)}")
            if self._settings.limits is not None:
                self._settings.limits.refuse_if_long(self._engine.load(), request.request_id)
            self._forwarder.forward(request)
        except PolyphaseError as error:
            self._tell_refusal(peer, request.request_id, error)
            return
        live = self._live.add(request.request_id, peer)
        if request.remaining_ms is not None:
            self._live.end_by(live, time.monotonic() + request.remaining_ms / 1e3 + DEADLINE_GRACE_S)
        if time.monotonic() - self._last_load_s >= ACCEPT_LOAD_INTERVAL_S:
            self._publish(None)

    def _refuse_at_the_door(self, request_id: str) -> None:
        """Raises: Draining; InvalidRequest for a name that is taken."""
        if self._draining.is_set():
            raise Draining(f"worker {self._entry.worker_id} is going away")
        if self._entry.is_asleep:
            raise Draining(f"worker {self._entry.worker_id} is asleep")
        if self._live.get(request_id) is not None:
            raise InvalidRequest(f"request {request_id} runs already on worker {self._entry.worker_id}")

    def _is_own(self, peer: PeerId, request_id: str) -> bool:
        live = self._live.get(request_id)
        return live is not None and live.peer == peer

    async def _open_and_submit(self, live: LiveRequest, request: Submit) -> None:
        """Cancel: nothing has reached the engine; `_stop_opening` forgets the request and releases the lease."""
        assert isinstance(request.offer, KvOffer)
        source: BlockSource | None = None
        try:
            try:
                source = await self._sources.open(request.offer)
                if self._ahead is not None and not await self._ahead.complete(request, request.offer, source):
                    source = None
            except PolyphaseError as error:
                with request_context(request.request_id):
                    log.warning("its offered blocks cannot be read and are computed here: %s", error)
            if source is None:
                self._release(request.offer)
            live.opening = live.offer = None
            self._submit(request, source)
        finally:
            if self._ahead is not None:
                self._ahead.forget(request.request_id)

    def _submit(self, request: Submit, source: BlockSource | None) -> None:
        peer_request = self._live.get(request.request_id)
        assert peer_request is not None
        try:
            if self._settings.limits is not None:  # nothing is awaited from here to the engine's own bookkeeping
                self._settings.limits.refuse_if_full(request, self._engine.load())
            if isinstance(request.offer, EngineOffer) and request.offer.kind != self._engine.card.offer_kind:
                self._engine.submit(msgspec.structs.replace(request, offer=None))
                with request_context(request.request_id):
                    log.info("its KV is at an engine of another kind (%s), and is computed here", request.offer.kind)
                self._release(request.offer)
            else:
                self._engine.submit(request, source)
            if time.monotonic() - self._last_load_s >= ACCEPT_LOAD_INTERVAL_S:
                self._publish(None)
            return
        except PolyphaseError as error:
            failure = error
        except Exception:  # the root of this request's work: whatever it was, the peer gets its answer
            with request_context(request.request_id):
                log.exception("the engine failed to accept a request")
            failure = EngineFailed("the engine failed to accept the request")
        self._live.remove(request.request_id)
        self._refuse(peer_request.peer, request, failure)

    def _refuse(self, peer: PeerId, request: Submit, error: PolyphaseError) -> None:
        if not isinstance(error, Refused):  # else the peer goes elsewhere at once, and takes the offer along
            self._release(request.offer)
        self._tell_refusal(peer, request.request_id, error)

    def _tell_refusal(self, peer: PeerId, request_id: str, error: PolyphaseError) -> None:
        with request_context(request_id):
            log.info("refused: %s", error.message)
        load = self._engine.load() if isinstance(error, Overloaded) else None
        self._send(peer, [_failed(request_id, error, load)])

    def _cancel(self, peer: PeerId, request_id: str) -> None:
        live = self._live.get(request_id)
        if live is not None and live.peer != peer:
            return  # somebody else's request of the same name
        if live is not None and self._stop_opening(live):
            self._send(peer, [SequenceOutput(request_id=request_id, finish_reason=FinishReason.CANCELLED)])
        else:
            self._engine.abort(request_id)  # also frees the lease of one that was handed over already
            if live is None:
                self._publish(None)

    def _hand_over(self, peer: PeerId, request_id: str) -> None:
        """The peer wants to go on with it elsewhere."""
        live = self._live.get(request_id)
        if live is None or live.peer != peer:
            return
        if live.opening is None:
            self._engine.hand_over(request_id)
            return
        live.opening.cancel()
        self._live.remove(request_id)
        self._send(peer, [SequenceOutput(request_id=request_id, finish_reason=FinishReason.HANDED_OVER, offer=live.offer)])

    def _switch_role(self, peer: PeerId, message: SwitchRole) -> None:
        reason = why_not_switch(message.role, self._entry, self._engine.card)
        if reason is None and message.role is not self._entry.role:
            reason = self._take_role(message.role)
        self._server.send(peer, Answer(message.query_id, self._status() if reason is None else Denied(reason)))

    async def _switch_sleep(self, peer: PeerId, message: SwitchSleep) -> None:
        reason: str | None
        if self._sleep is None:
            reason = f"its engine cannot ({self._engine.card.engine}); --enable-sleep-mode is vLLM's flag for it"
        elif self._draining.is_set():
            reason = "it is draining"
        else:
            reason = await (self._sleep.fall_asleep() if message.is_asleep else self._sleep.wake())
        body = self._status() if reason is None else Denied(f"worker {self._entry.worker_id}: {reason}")
        self._server.send(peer, Answer(message.query_id, body))

    def _tell_asleep(self, is_asleep: bool) -> None:
        if self._entry.is_asleep is not is_asleep:
            entry = msgspec.structs.replace(self._entry, is_asleep=is_asleep)
            self._lease.update(entry)
            self._entry = entry
            log.info("asleep: takes no requests" if is_asleep else "awake")

    def _is_busy(self) -> bool:
        return bool(self._live) or self._engine.load().leased_block_count > 0

    def _take_role(self, role: Role) -> str | None:
        """Returns: why not. A role that the registry does not show would only make frontends send what is then refused."""
        entry = msgspec.structs.replace(self._entry, role=role)
        try:
            self._lease.update(entry)
        except OSError as error:
            return f"worker {entry.worker_id} keeps its role {self._entry.role}: the registry cannot be told of another: {error}"
        before, self._entry = self._entry.role, entry
        try:
            self._lease.remember_role(role)
        except OSError as error:
            log.warning("after a restart the role will be the one before: %s", error)
        log.info("role: %s, was %s; %d of %d requests are to move", role, before, self._live.count_misplaced(role), len(self._live))
        return None

    def _status(self) -> WorkerStatus:
        return WorkerStatus(
            entry=self._entry,
            load=self._engine.load(),
            uptime_s=uptime_s(),
            rss_bytes=rss_bytes(),
            engine=self._engine.card.engine,
            abilities=[str(ability) for ability in abilities_of(self._engine)],
            misplaced_count=self._live.count_misplaced(self._entry.role),
        )

    def _abort(self, live: LiveRequest) -> None:
        """Forget a request; what the engine still says of it reaches nobody."""
        if not self._stop_opening(live):
            self._live.remove(live.request_id)
            self._engine.abort(live.request_id)

    def _stop_opening(self, live: LiveRequest) -> bool:
        """True if the engine does not know the request yet; it is forgotten then, and its offer given back."""
        if live.opening is None:
            return False
        live.opening.cancel()
        self._release(live.offer)
        self._live.remove(live.request_id)
        return True

    def _answer(self, peer: PeerId, query: Query) -> None:
        match query.question:
            case Question.CARD:
                body: Answer = Answer(query.query_id, self._engine.card)
            case Question.SNAPSHOT:
                try:
                    body = Answer(query.query_id, self._publisher.source.page(query.cursor))
                except ValueError as error:
                    log.warning("a question is not answered: %s", error)
                    return
            case Question.BATCHES:
                body = Answer(query.query_id, self._publisher.source.missed(query.after))
            case Question.STATUS:
                body = Answer(query.query_id, self._status())
        self._server.send(peer, body)

    def _find_blocks(self, message: FindBlocks) -> HeldBlocks | Denied:
        if self._exporter is None or self._region is None:
            return Denied(f"no other process can read the blocks of worker {self._entry.worker_id}")
        if message.epoch != self._entry.epoch:
            return Denied(f"worker {self._entry.worker_id} has begun another life")
        return HeldBlocks(self._exporter.find_blocks(message.first_block, [ContentKey(key) for key in message.keys]))

    # From the engine

    def _on_step(self, report: StepReport) -> None:
        self._outbox.step = report.step
        has_finished = False
        for peer, outputs in self._live.group(report.outputs).items():
            for output in outputs:
                if output.finish_reason is not None:
                    has_finished = True
                    self._finish(output)
                if isinstance(output.offer, KvOffer):
                    self._lend(output.offer)
            if not self._send(peer, outputs):
                self._drop_offers(outputs)
        for offer in report.released_offers:
            self._release(offer)
        if report.events or has_finished or time.monotonic() - self._last_load_s >= LOAD_INTERVAL_S:
            self._publish(report)
        self._end_overdue()

    def _finish(self, output: SequenceOutput) -> None:
        live = self._live.get(output.request_id)
        assert live is not None
        with request_context(output.request_id):
            if output.failure is not None:
                log.warning("failed after %d tokens: %s: %s", live.token_count, output.failure.code, output.failure.message)
            else:
                log.info("finished: %s, %d tokens", output.finish_reason, live.token_count)
        self._live.remove(output.request_id)

    def _lend(self, offer: KvOffer) -> None:
        """From now on the lease also ends by the agent: when its reader gives it back there, or dies.

        An offer that came with a request and goes on with it unread is another worker's, or was lent before: its lease stays as it is.
        """
        exporter, region = self._exporter, self._region
        is_ours = (offer.worker_id, offer.epoch) == (self._entry.worker_id, self._entry.epoch)
        if exporter is None or region is None or not is_ours or offer.lease_id in self._agent.lending:
            return
        loop = asyncio.get_running_loop()

        def on_end(lease_id: str, why: LeaseEnd) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and all leases with it
                loop.call_soon_threadsafe(exporter.release_lease, lease_id)

        ttl_s = max(0.0, (offer.expires_at_ns - time.monotonic_ns()) / 1e9)
        self._agent.lend(region, offer.block_ids, ttl_s, on_end, offer.lease_id)

    def _publish(self, report: StepReport | None) -> None:
        self._last_load_s = time.monotonic()
        self._publisher.publish(report.events if report else [], self._engine.load())

    def _send(self, peer: PeerId, outputs: list[SequenceOutput]) -> bool:
        """False: the peer has gone or does not read; its requests are aborted."""
        if self._outbox.send(peer, outputs):
            return True
        requests = self._live.of_peer(peer)
        self._outbox.owe(peer, [live.request_id for live in requests])
        if requests:
            log.warning("a peer went away or does not read; %d requests of it are aborted", len(requests))
        for live in requests:
            self._abort(live)
        return False

    # In the course of time

    async def _beat(self) -> None:
        """Once a second: report the load, and find out whether peers whose requests only wait are still there."""
        while True:
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)
            self._end_overdue()
            self._publish(None)
            for offer in self._sources.undelivered():
                self._releases.send(offer)
            self._releases.close_idle()
            self._holders.close_idle()
            self._sources.close_idle()
            if self._ahead is not None:
                self._ahead.forget_idle()
            self._outbox.settle()
            for peer in self._outbox.unheard(self._live.peers(), HEARTBEAT_INTERVAL_S):
                self._send(peer, [])

    def _end_overdue(self) -> None:
        """Nothing is computed for those whom nobody awaits any more."""
        for live in self._live.overdue(time.monotonic()):
            with request_context(live.request_id):
                log.warning("given up: its deadline has passed, and nobody cancelled it")
            self._abort(live)
            error = DeadlineExceeded(f"worker {self._entry.worker_id} had not finished the request by its deadline")
            self._send(live.peer, [_failed(live.request_id, error)])

    def _fail_all(self, error: Lost) -> None:
        """End whatever is left with an error that lets the peer try elsewhere."""
        for peer in self._live.peers():
            requests = self._live.of_peer(peer)
            for live in requests:
                self._abort(live)
            self._send(peer, [_failed(live.request_id, error) for live in requests])

    def _release(self, offer: Offer | None) -> None:
        """What came with a request is fetched, or not wanted: its owner may have the blocks back."""
        if offer is not None and not (isinstance(offer, KvOffer) and self._sources.give_back(offer)):
            self._releases.send(offer)

    def _drop_offers(self, outputs: list[SequenceOutput]) -> None:
        """Offers that nobody received keep KV for nothing."""
        for output in outputs:
            if output.offer is not None and self._lender is not None:
                self._lender.release_lease(output.offer.lease_id)


def engine_failure(group: BaseExceptionGroup[BaseException]) -> EngineFailed | None:
    """What the engine itself said of its end, somewhere in a group; None if it said nothing."""
    for error in group.exceptions:
        found = engine_failure(error) if isinstance(error, BaseExceptionGroup) else error
        if isinstance(found, EngineFailed):
            return found
    return None


def _failed(request_id: str, error: PolyphaseError, load: Load | None = None) -> SequenceOutput:
    failure = WireFailure(error.code, error.message, error.is_retryable, load)
    return SequenceOutput(request_id=request_id, finish_reason=FinishReason.ERROR, failure=failure)
