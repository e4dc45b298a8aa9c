"""Pools of other workers that this process has opened, by pool id, so that each is mapped once.

A mapped pool keeps its memory alive even if its owner is dead. So the pool of an earlier life goes when that of the next one is opened, and
any pool goes that was not asked for in a while; opening it again costs a millisecond.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

from polyphase.core.clock import Clock, MonotonicClock
from polyphase.core.errors import TransferError
from polyphase.transfer.handover import open_pool
from polyphase.transfer.opened import OpenedPool
from polyphase.wire.kv import PoolDescriptor

MAX_OPEN_POOLS = 64  # then the least recently used goes
IDLE_S = 60.0


@dataclass(slots=True)
class _Opened:
    pool: OpenedPool
    socket_path: str  # the same in all lives of a worker
    used_ns: int


class OpenedPools:
    """Opens pools on demand. Used on one event loop; the pools themselves may be read in any thread."""

    def __init__(self, timeout_s: float = 2.0, clock: Clock = MonotonicClock()) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._opened: OrderedDict[str, _Opened] = OrderedDict()  # least recently used first
        self._opening: dict[str, asyncio.Task[OpenedPool]] = {}
        self._is_closed = False

    async def get(self, descriptor: PoolDescriptor) -> OpenedPool:
        """The pool, opened now or before. Callers that ask at the same time share one attempt.

        Raises: TransferError as `open_pool`; the next call tries again.
        Cancel: the attempt goes on for the others and its pool is kept.
        Owner: this cache; do not close what it returns.
        """
        pool_id = descriptor.pool_id
        opened = self._opened.get(pool_id)
        if opened is not None:
            _check_sizes(opened.pool, descriptor)
            opened.used_ns = self._clock.now_ns()
            self._opened.move_to_end(pool_id)
            return opened.pool
        if self._is_closed:
            raise TransferError("this process is closing and opens no more block pools")
        task = self._opening.get(pool_id)
        if task is None:
            task = asyncio.create_task(self._open(descriptor), name=f"open-pool-{pool_id[:8]}")
            self._opening[pool_id] = task
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # a failure nobody waits for is no news
        pool = await asyncio.shield(task)
        _check_sizes(pool, descriptor)
        return pool

    async def _open(self, descriptor: PoolDescriptor) -> OpenedPool:
        try:
            pool = await open_pool(descriptor, self._timeout_s)
        finally:
            del self._opening[descriptor.pool_id]
        if self._is_closed:
            pool.close()
            raise TransferError("this process is closing and opens no more block pools")
        for earlier_id in [key for key, opened in self._opened.items() if opened.socket_path == descriptor.socket_path]:
            self.forget(earlier_id)
        if len(self._opened) >= MAX_OPEN_POOLS:
            self.forget(next(iter(self._opened)))
        self._opened[descriptor.pool_id] = _Opened(pool, descriptor.socket_path, self._clock.now_ns())
        return pool

    def close_idle(self) -> None:
        """Unmap pools that were not asked for in the last minute; called now and then."""
        oldest_ns = self._clock.now_ns() - int(IDLE_S * 1e9)
        for pool_id in [key for key, opened in self._opened.items() if opened.used_ns < oldest_ns]:
            self.forget(pool_id)

    def forget(self, pool_id: str) -> None:
        """Unmap a pool, whose owner is gone for example. Unknown ids are ignored."""
        opened = self._opened.pop(pool_id, None)
        if opened is not None:
            opened.pool.close()

    def close(self) -> None:
        self._is_closed = True
        for task in list(self._opening.values()):
            task.cancel()
        for pool_id in list(self._opened):
            self.forget(pool_id)


def _check_sizes(pool: OpenedPool, descriptor: PoolDescriptor) -> None:
    """A second descriptor of a known pool must describe the same pool."""
    found, wanted = (pool.block_count, pool.block_bytes), (descriptor.block_count, descriptor.layout.block_bytes)
    if found != wanted:
        raise TransferError(f"block pool {pool.pool_id} has {found} (blocks, bytes each), the offer says {wanted}")
