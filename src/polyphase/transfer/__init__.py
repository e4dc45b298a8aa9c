"""KV blocks move between the memories of processes.

In come a pool's size, or an offer's descriptor; out come memory to keep blocks in, and copies of another worker's blocks. Each read
either brings exactly the blocks that were offered or raises `TransferError`. This plane never decides what to move, knows no model,
and never writes into another process's memory.
"""

from polyphase.transfer.handover import PoolServer, open_pool
from polyphase.transfer.opened import OpenedPool
from polyphase.transfer.pool import SharedPool
from polyphase.transfer.pools import OpenedPools

__all__ = ["OpenedPool", "OpenedPools", "PoolServer", "SharedPool", "open_pool"]
