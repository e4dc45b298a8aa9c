"""What a backend of the transfer library must do. `polyphase.testing.transfer` holds the tests that every backend has to pass.

The agent does what all have in common: negotiation, connections and their proofs, checking of descriptors, deadlines, threads, leases and
notifications. A backend moves the blocks of one `Job` at a time, on a thread that it may block until the job's deadline.

Nobody writes into another process's memory: a read is copied by its reader, a write by the owner of its target.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from polyphase.core.clock import Clock
from polyphase.transfer.blocks import BlockMemory
from polyphase.transfer.channel import Channel
from polyphase.transfer.reactor import Timer
from polyphase.transfer.region import Region
from polyphase.transfer.wire import Wire
from polyphase.wire.transfer import AgentCard, BackendCard, Greeting, RegionCard


@dataclass(slots=True, eq=False)
class Job:
    """Blocks that one call of a backend moves. Lists are of equal length and checked against both regions."""

    remote: RegionCard
    remote_ids: array[int]
    remote_generations: array[int]  # that the remote blocks must have, before and after
    local: Region
    local_ids: array[int]
    verdicts: memoryview  # one byte a block; whatever is still PENDING when the call raises gets the error's verdict
    deadline_ns: int  # of the agent's clock
    stop: bytearray  # one byte, set to 1 when the transfer is given up: end soon, leave the rest PENDING
    on_stop: Callable[[], None] | None = None  # a backend that sleeps sets it, to be woken; called on any thread after `stop` is set


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether a backend can join two agents. `rank`: the higher, the better (GB/s, about); None: it cannot. `reason`: either way."""

    rank: float | None
    reason: str


class Services(Protocol):
    """What an agent does for its backends."""

    @property
    def card(self) -> AgentCard: ...

    @property
    def clock(self) -> Clock: ...

    def call_at(self, at_ns: int, task: Callable[[], None]) -> Timer:
        """Run a short task at a time of `clock`."""

    def submit(self, task: Callable[[], None]) -> None:
        """Run soon, on a thread that it may block for a while."""

    def dial(self, theirs: AgentCard, purpose: str, session_id: bytes, deadline_ns: int) -> Wire:
        """A greeted connection to a peer's `Backend.serve` of the same name. Owner: the caller.

        Raises: PeerLost, TransferTimeout, TransferRefused, StaleDescriptor.
        """

    def open_socket_channel(self, theirs: AgentCard, session_id: bytes, deadline_ns: int) -> Channel:
        """Leases and notifications over sockets: what most backends return from `open_channel`. Raises: as `dial`."""

    def region(self, region_id: str) -> Region:
        """A region of this agent. Raises: StaleDescriptor if it is not registered (any more)."""


class Link(Protocol):
    """The way to one peer. Calls of `read` and `write` may come from several threads at once, up to `lane_count` for one transfer."""

    @property
    def lane_count(self) -> int: ...

    def read(self, job: Job) -> None:
        """Copy the remote blocks into the local ones and write a verdict for each; blocks until done, given up, or the deadline.

        After it returns or raises, nothing of this job is written into local memory any more.

        Raises: TransferError for what befell all blocks that are still PENDING.
        """

    def write(self, job: Job) -> None:
        """Copy the local blocks into the remote ones, through the owner of those. Raises: as `read`."""

    def close(self) -> None:
        """Calls that are under way end soon, with PeerLost. Idempotent."""


class Backend(Protocol):
    """One way to move blocks, as one agent has it. Owner: the agent, by `close`."""

    @property
    def name(self) -> str: ...

    def start(self, services: Services) -> BackendCard:
        """Called once, before anything else. Raises: TransferRefused with the reason if it cannot work on this machine."""

    def moves(self, kind: str) -> bool:
        """Whether memory of this kind can be this agent's own end of a transfer."""

    def why_not(self, memory: BlockMemory) -> str | None:
        """Why peers cannot reach this memory through this backend; None if they can."""

    def attach(self, region: Region) -> None:
        """A region was registered whose kind this backend moves."""

    def detach(self, region: Region) -> None:
        """The region is released; no job uses it any more."""

    def judge(self, mine: AgentCard, theirs: AgentCard) -> Judgement:
        """From the two cards alone. Both sides come to the same answer, up to rank."""

    def open_channel(self, theirs: AgentCard, session_id: bytes, deadline_ns: int) -> Channel:
        """Begin a session with a peer that was judged possible. Raises: TransferError. Owner: the session closes the channel."""

    def connect(self, theirs: AgentCard, session_id: bytes) -> Link:
        """Waits for nobody: what has to be opened is opened by the first job. Owner: the session closes the link."""

    def serve(self, wire: Wire, greeting: Greeting) -> None:
        """Answer one request of a peer that has come in on `wire`; called again for the next. The wire's deadline is set for the answer.

        Raises: any PolyphaseError; the wire is closed then.
        """

    def close(self) -> None:
        """Nothing of this backend runs afterwards. Idempotent."""
