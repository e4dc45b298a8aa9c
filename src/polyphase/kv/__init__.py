"""Which block of the pool holds what: references, cached prefixes, eviction, leases. Decides only; no tensor, clock, socket or file.

In come token ids, counts and instants; out go block ids to compute into and the KV events that tell the world what is cached. The
plane never touches the memory that the blocks stand for: whoever does asks here first.
"""

from polyphase.kv.cache import PrefixCache, SequenceBlocks
from polyphase.kv.chain import BlockNames, GivenNames, PrefixChain
from polyphase.kv.journal import EventJournal
from polyphase.kv.leases import LeaseTable
from polyphase.kv.ledger import Ledger
from polyphase.kv.pool import BlockPool

__all__ = [
    "BlockNames",
    "BlockPool",
    "EventJournal",
    "GivenNames",
    "LeaseTable",
    "Ledger",
    "PrefixCache",
    "PrefixChain",
    "SequenceBlocks",
]
