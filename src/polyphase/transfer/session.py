"""An agent's side of a meeting with one life of one peer: reads, writes, leases and notifications."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

from polyphase.core.errors import ForeignDescriptor, HandleReleased, PeerLost, TransferError
from polyphase.transfer.backends.interface import Job, Link
from polyphase.transfer.blocks import LocalBlocks, RemoteBlocks, checked_ids, words_of
from polyphase.transfer.channel import Channel
from polyphase.transfer.choice import Choice, choose_for_regions
from polyphase.transfer.inbox import check_payload
from polyphase.transfer.transfer import Lane, Transfer
from polyphase.transfer.verdicts import Outcome, Verdict
from polyphase.wire.transfer import AgentCard, BlockOffer, RegionCard

if TYPE_CHECKING:
    from polyphase.transfer.agent import Agent
    from polyphase.transfer.region import Region

log = logging.getLogger(__name__)

INLINE_BYTES = 128 << 10  # a smaller transfer within one host is done before another thread would have woken up
MIN_LANE_BYTES = 4 << 20
DEFAULT_TIMEOUT_S = 30.0


class Session:
    """Made by `Agent.connect`. Any thread. Owner: the caller, by `with` or `release`."""

    def __init__(self, agent: Agent, peer: AgentCard, choice: Choice, session_id: bytes, channel: Channel) -> None:
        self.agent = agent
        self.peer = peer
        self.choice = choice
        self.session_id = session_id
        self._channel = channel
        self._regions = {region.region_id: region for region in peer.regions}
        self._links: dict[str, Link] = {}
        self._linking = threading.Lock()
        self._lock = threading.Lock()
        self._running: set[Transfer] = set()
        self._is_released = False

    @property
    def backend(self) -> str:
        """The backend that is used wherever both memories allow it."""
        return self.choice.possible[0]

    def why(self) -> str:
        """For each backend, why it was chosen or not."""
        return self.choice.explain()

    @property
    def is_lost(self) -> bool:
        """Whether the peer is known to be gone. Blocks of shared memory stay readable."""
        return self._channel.is_lost

    # Descriptors.

    def region(self, region: RegionCard) -> RegionCard:
        """Make a region of the peer known that it registered after its card was made."""
        self._check()
        return self._regions.setdefault(region.region_id, region)

    def blocks(self, region_id: str, block_ids: Iterable[int], generations: Iterable[int]) -> RemoteBlocks:
        """A list of the peer's blocks, checked once. Raises: ForeignDescriptor, HandleReleased."""
        self._check()
        region = self._regions.get(region_id)
        if region is None:
            raise ForeignDescriptor(f"agent {self.peer.agent_id} has no region {region_id} that this session knows of")
        ids = checked_ids(block_ids, region.block_count, f"region {region_id}")
        expected = words_of(generations, "generations")
        if len(expected) != len(ids):
            raise ForeignDescriptor(f"{len(ids)} blocks were described with {len(expected)} generations")
        return RemoteBlocks(self, region, ids, expected)

    def take(self, offer: BlockOffer) -> RemoteBlocks:
        """Blocks of an offer; the peer keeps them for us until `give_back`, our death, or the end of the lease.

        Raises: ForeignDescriptor if another agent, or another life of it, made the offer.
        """
        self._check()
        if (offer.agent.agent_id, offer.agent.epoch) != (self.peer.agent_id, self.peer.epoch):
            raise ForeignDescriptor(
                f"the offer is of agent {offer.agent.agent_id}, epoch {offer.agent.epoch}; "
                f"this session is with {self.peer.agent_id}, epoch {self.peer.epoch}"
            )
        region = offer.agent.region(offer.region_id)
        if region is not None:
            self.region(region)
        blocks = self.blocks(offer.region_id, offer.block_ids, offer.generations)
        self.take_lease(offer.lease_id)
        return blocks

    def take_lease(self, lease_id: str) -> None:
        """From now on the lease ends with this session. A dead peer is no error here: reading will tell."""
        with contextlib.suppress(PeerLost):
            self._channel.take(lease_id)

    def give_back(self, lease_id: str) -> None:
        """Acknowledge: the peer may have its blocks back. Never waits; a dead peer is no error."""
        self._check()
        with contextlib.suppress(PeerLost):
            self._channel.release(lease_id)

    # Blocks.

    def read(self, source: RemoteBlocks, into: LocalBlocks, timeout_s: float = DEFAULT_TIMEOUT_S, notify: bytes | None = None) -> Transfer:
        """Post a read; it runs from now on.

        Args:
            timeout_s: it ends by then, done or failed.
            notify: sent to the peer when all blocks are good.

        Raises: ForeignDescriptor, HandleReleased; TransferRefused if no backend reaches both memories.
        """
        return self._post(source, into, timeout_s, notify, is_read=True)

    def write(self, source: LocalBlocks, into: RemoteBlocks, timeout_s: float = DEFAULT_TIMEOUT_S, notify: bytes | None = None) -> Transfer:
        """Post a write: the peer's agent copies, and checks that the target blocks still have the generations we were given."""
        return self._post(into, source, timeout_s, notify, is_read=False)

    def fetch(self, source: RemoteBlocks, into: LocalBlocks, timeout_s: float = DEFAULT_TIMEOUT_S) -> Outcome:
        """Read on the calling thread: for those that have one to spare and nothing to do meanwhile."""
        transfer, _ = self._prepare(source, into, timeout_s, None, is_read=True)
        return transfer.wait()

    def _post(self, remote: RemoteBlocks, local: LocalBlocks, timeout_s: float, notify: bytes | None, *, is_read: bool) -> Transfer:
        transfer, lanes = self._prepare(remote, local, timeout_s, notify, is_read=is_read)
        is_small = is_read and self.agent.is_on_this_host(self.peer) and len(remote) * remote.region.block_bytes <= INLINE_BYTES
        for lane in lanes:
            if is_small:
                transfer.perform(lane)
            else:
                self.agent.runtime.submit(lambda lane=lane: transfer.perform(lane))  # type: ignore[misc]
        return transfer

    def _prepare(
        self, remote: RemoteBlocks, local: LocalBlocks, timeout_s: float, notify: bytes | None, *, is_read: bool
    ) -> tuple[Transfer, list[Lane]]:
        self._check()
        self._check_lists(remote, local)
        deadline_ns = self.agent.clock.now_ns() + int(timeout_s * 1e9)
        link = self._link_for(remote.region, local.region, is_read=is_read)
        verdicts = bytearray(len(remote))
        lanes = [Lane(job) for job in _split(remote, local, verdicts, deadline_ns, link.lane_count)]
        transfer = Transfer(self, link, lanes, verdicts, is_read=is_read, notify=notify)
        with self._lock:
            self._check()
            self._running.add(transfer)
        transfer.arm()
        return transfer, lanes

    def _check_lists(self, remote: RemoteBlocks, local: LocalBlocks) -> None:
        if remote.session is not self:
            raise ForeignDescriptor("the remote blocks were prepared in another session")
        if local.region.agent is not self.agent:
            raise ForeignDescriptor("the local blocks belong to another agent")
        local.region.check()
        if len(remote) != len(local):
            raise ForeignDescriptor(f"{len(remote)} remote blocks and {len(local)} local ones do not fit each other")
        if not len(remote):
            raise ForeignDescriptor("a transfer needs at least one block")
        if remote.region.block_bytes != local.region.card.block_bytes:
            raise ForeignDescriptor(
                f"the peer's blocks have {remote.region.block_bytes} bytes, the local ones {local.region.card.block_bytes}; "
                "blocks of other shapes are moved by polyphase.transfer.reshape"
            )

    def _link_for(self, remote: RegionCard, local: Region, *, is_read: bool) -> Link:
        # What is written is fetched by the peer, so the peer must be able to reach it.
        reach = local.usable_backends if is_read else [name for name in local.usable_backends if name in local.card.backends]
        name = choose_for_regions(self.choice, reach, remote)
        link = self._links.get(name)
        if link is None:
            with self._linking:
                link = self._links.get(name)
                if link is None:
                    link = self._links[name] = self.agent.backend(name).connect(self.peer, self.session_id)
        return link

    def exclude(self, link: Link, reason: str) -> None:
        """A backend that both have cannot join these two processes after all: later transfers go by the next best."""
        name = next((name for name, known in self._links.items() if known is link), None)
        if name is not None and name in self.choice.possible:
            log.warning("blocks of agent %s are no longer read by %s: %s", self.peer.agent_id, name, reason)
            self.choice = self.choice.without(name, reason)

    def forget(self, transfer: Transfer) -> None:
        """The transfer has ended."""
        with self._lock:
            self._running.discard(transfer)

    def running(self) -> list[Transfer]:
        with self._lock:
            return list(self._running)

    # Words.

    def notify(self, payload: bytes, timeout_s: float = 5.0) -> None:
        """Into the peer's inbox, after everything that was sent before.

        Raises: TransferError if the payload is too long; PeerLost; TransferTimeout if the peer does not read; HandleReleased.
        """
        self._check()
        check_payload(payload)
        self._channel.notify(payload, timeout_s)

    def release(self) -> None:
        """End the meeting: transfers are cancelled and have ended on return, leases taken here end at the peer.

        Raises: HandleReleased the second time.
        """
        with self._lock:
            self._check()
            self._is_released = True
            running = list(self._running)
        for transfer in running:
            transfer.give_up(Verdict.CANCELLED)
        for link in self._links.values():
            with contextlib.suppress(TransferError):
                link.close()
        for transfer in running:
            transfer.join()
        self._channel.close()
        self.agent.forget_session(self)

    @property
    def is_released(self) -> bool:
        return self._is_released

    def _check(self) -> None:
        if self._is_released:
            raise HandleReleased(f"the session with agent {self.peer.agent_id} was released before")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._is_released:
            self.release()


def _split(remote: RemoteBlocks, local: LocalBlocks, verdicts: bytearray, deadline_ns: int, lane_count: int) -> list[Job]:
    """Equal parts, each worth a lane of its own."""
    count = len(remote)
    parts = max(1, min(lane_count, count * remote.region.block_bytes // MIN_LANE_BYTES, count))
    view = memoryview(verdicts)
    bounds = [count * part // parts for part in range(parts + 1)]
    return [
        Job(
            remote=remote.region,
            remote_ids=remote.ids[start:end],
            remote_generations=remote.generations[start:end],
            local=local.region,
            local_ids=local.ids[start:end],
            verdicts=view[start:end],
            deadline_ns=deadline_ns,
            stop=bytearray(1),
        )
        for start, end in pairwise(bounds)
    ]
