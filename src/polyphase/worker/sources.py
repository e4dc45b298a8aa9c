"""Other workers' blocks, ready to be read: one session with each agent, so that its pool is mapped once.

A session ends when its peer's next life is met, or when it was not asked for in a while; beginning it again costs a millisecond or two.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict, deque
from dataclasses import dataclass

from polyphase.core.clock import Clock, MonotonicClock
from polyphase.core.errors import HandleReleased, TransferError
from polyphase.transfer import Agent, PeerBlocks, Session
from polyphase.transfer.source import region_of_offer
from polyphase.wire.kv import KvOffer
from polyphase.wire.transfer import AgentCard

log = logging.getLogger(__name__)

MAX_SESSIONS = 64  # then the least recently used goes
MAX_GIVEN_BACK = 512  # remembered for as long as their leases might last
IDLE_S = 60.0
CONNECT_TIMEOUT_S = 2.0

_Life = tuple[str, int]  # an agent's id and epoch


@dataclass(slots=True)
class _Met:
    session: Session
    used_ns: int


class OfferSources:
    """Meets agents on demand. Used on one event loop; the sources themselves may be read in any thread. Owner of the agent: the caller."""

    def __init__(self, agent: Agent, clock: Clock = MonotonicClock()) -> None:
        self._agent = agent
        self._clock = clock
        self._met: OrderedDict[_Life, _Met] = OrderedDict()  # least recently used first
        self._meeting: dict[_Life, asyncio.Task[Session]] = {}
        self._given_back: deque[tuple[Session, KvOffer]] = deque(maxlen=MAX_GIVEN_BACK)
        self._is_closed = False

    async def open(self, offer: KvOffer) -> PeerBlocks:
        """The blocks of the offer's region; from now on the lease ends with us. Callers that ask at the same time share one attempt.

        Raises: TransferError as `Agent.connect`; the next call tries again.
        Cancel: the attempt goes on for the others.
        """
        blocks = await self.meet(offer.agent, offer.region_id)
        blocks.session.take_lease(offer.lease_id)
        return blocks

    async def meet(self, agent: AgentCard, region_id: str) -> PeerBlocks:
        """The same without a lease."""
        region = region_of_offer(agent.region(region_id), region_id)
        return PeerBlocks(await self._session(agent), region)

    def give_back(self, offer: KvOffer) -> bool:
        """End the offer's lease. False: there is no session with its agent, so it must be told otherwise."""
        met = self._met.get(_life(offer.agent))
        if met is None or met.session.is_lost:
            return False
        try:
            met.session.give_back(offer.lease_id)
        except HandleReleased:
            return False
        self._given_back.append((met.session, offer))
        return True

    def undelivered(self) -> list[KvOffer]:
        """Offers whose agents we have lost since we gave them back, and that may not know of it. Each is told of once."""
        now_ns = self._clock.now_ns()
        lost = [offer for session, offer in self._given_back if session.is_lost and offer.expires_at_ns > now_ns]
        kept = [(session, offer) for session, offer in self._given_back if not session.is_lost and offer.expires_at_ns > now_ns]
        self._given_back = deque(kept, MAX_GIVEN_BACK)
        return lost

    async def _session(self, agent: AgentCard) -> Session:
        life = _life(agent)
        met = self._met.get(life)
        if met is not None:
            met.used_ns = self._clock.now_ns()
            self._met.move_to_end(life)
            return met.session
        if self._is_closed:
            raise TransferError("this process is closing and meets no more agents")
        task = self._meeting.get(life)
        if task is None:
            task = asyncio.create_task(self._meet(agent), name=f"meet-{agent.agent_id}")
            self._meeting[life] = task
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # a failure nobody waits for is no news
        return await asyncio.shield(task)

    async def _meet(self, agent: AgentCard) -> Session:
        life = _life(agent)
        try:
            session = await self._agent.connect_async(agent, CONNECT_TIMEOUT_S)
        finally:
            del self._meeting[life]
        log.info("met agent %s: its blocks are read by %s. %s", agent.agent_id, session.backend, session.why().replace("\n", "; "))
        if self._is_closed:
            session.release()
            raise TransferError("this process is closing and meets no more agents")
        for earlier in [known for known in self._met if known[0] == life[0]]:
            self._forget(earlier)
        if len(self._met) >= MAX_SESSIONS:
            self._forget(next(iter(self._met)))
        self._met[life] = _Met(session, self._clock.now_ns())
        return session

    def close_idle(self) -> None:
        """End sessions that were not asked for in the last minute; called now and then."""
        oldest_ns = self._clock.now_ns() - int(IDLE_S * 1e9)
        for life in [life for life, met in self._met.items() if met.used_ns < oldest_ns]:
            self._forget(life)

    def _forget(self, life: _Life) -> None:
        with contextlib.suppress(HandleReleased):
            self._met.pop(life).session.release()

    def close(self) -> None:
        self._is_closed = True
        for task in list(self._meeting.values()):
            task.cancel()
        for life in list(self._met):
            self._forget(life)


def _life(agent: AgentCard) -> _Life:
    return agent.agent_id, agent.epoch
