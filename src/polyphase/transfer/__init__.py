"""KV blocks move between the memories of processes.

In come registered memory and lists of blocks, a peer's card or an offer; out come copies of another agent's blocks, with a verdict on
each: exactly what was offered, or not to be used. This plane never decides what to move, knows no model, and never writes into another
process's memory.
"""

from polyphase.transfer.agent import Agent
from polyphase.transfer.blocks import BlockMemory, HostMemory, LocalBlocks, RemoteBlocks
from polyphase.transfer.inbox import Notification
from polyphase.transfer.lending import LeaseEnd
from polyphase.transfer.pool import SharedPool
from polyphase.transfer.region import Region
from polyphase.transfer.session import Session
from polyphase.transfer.source import PeerBlocks
from polyphase.transfer.transfer import Transfer
from polyphase.transfer.verdicts import Outcome, Verdict

__all__ = [
    "Agent",
    "BlockMemory",
    "HostMemory",
    "LeaseEnd",
    "LocalBlocks",
    "Notification",
    "Outcome",
    "PeerBlocks",
    "Region",
    "RemoteBlocks",
    "Session",
    "SharedPool",
    "Transfer",
    "Verdict",
]
