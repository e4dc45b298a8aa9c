"""Asks other workers where they have a prefix cached. Whatever they do not say in time, the asker computes.

A worker that is dead, stopped or overwhelmed says nothing; after one silence it is not asked for a while, so that it costs those who
name it a moment each few seconds, all of them together.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

from polyphase.core.clock import Clock, MonotonicClock
from polyphase.core.errors import WorkerLost
from polyphase.core.ids import ContentKey
from polyphase.runtime import WorkerClient
from polyphase.wire.kv import KvPart
from polyphase.wire.requests import KvHolder

SILENCE_S = 2.0  # not asked for so long after it did not answer; doubled each time, up to
LONGEST_SILENCE_S = 30.0
IDLE_S = 30.0
MAX_CONNECTIONS = 64

_Life = tuple[str, int]  # worker id, epoch


class Silences:
    """Which lives of workers are not worth asking just now. No clock of its own."""

    def __init__(self) -> None:
        self._until_ns: OrderedDict[_Life, tuple[int, float]] = OrderedDict()  # and how long it is, seconds

    def note_silence(self, life: _Life, now_ns: int) -> None:
        _, before_s = self._until_ns.pop(life, (0, SILENCE_S / 2))
        length_s = min(2 * before_s, LONGEST_SILENCE_S)
        self._until_ns[life] = (now_ns + int(length_s * 1e9), length_s)
        if len(self._until_ns) > MAX_CONNECTIONS:
            self._until_ns.popitem(last=False)

    def note_answer(self, life: _Life) -> None:
        self._until_ns.pop(life, None)

    def is_silent(self, life: _Life, now_ns: int) -> bool:
        return now_ns < self._until_ns.get(life, (0, 0.0))[0]


class Holders:
    """Connections to workers that may hold blocks. Used on one event loop, `run` as a task. Owner: whoever made it calls `close`."""

    def __init__(self, name: str, clock: Clock = MonotonicClock()) -> None:
        self._client = WorkerClient(lambda _: None, name, on_cut=self._on_cut)
        self._clock = clock
        self._silences = Silences()
        self._used_ns: OrderedDict[str, int] = OrderedDict()  # by endpoint, least recently used first

    async def run(self) -> None:
        """Receive answers until cancelled."""
        await self._client.run()

    def is_silent(self, holder: KvHolder) -> bool:
        """It did not answer lately; not to be asked."""
        return self._silences.is_silent((holder.worker_id, holder.epoch), self._clock.now_ns())

    def note_silence(self, holder: KvHolder) -> None:
        """It answered, and then nothing came."""
        self._silences.note_silence((holder.worker_id, holder.epoch), self._clock.now_ns())

    async def find(self, holder: KvHolder, first_block: int, keys: Sequence[ContentKey], timeout_s: float) -> KvPart:
        """The first of these blocks, as far as the holder has them.

        Raises: WorkerLost if it does not answer in time, or cannot.
        Cancel: a late answer is dropped.
        """
        life, endpoint = (holder.worker_id, holder.epoch), holder.endpoint
        try:
            self._connect(endpoint)
            part = await self._client.find_blocks(endpoint, holder.epoch, first_block, list(keys), timeout_s)
        except WorkerLost:
            self._silences.note_silence(life, self._clock.now_ns())
            raise
        self._silences.note_answer(life)
        return part

    def _connect(self, endpoint: str) -> None:
        if endpoint not in self._used_ns:
            self._client.connect(endpoint, endpoint)
        self._used_ns[endpoint] = self._clock.now_ns()
        self._used_ns.move_to_end(endpoint)
        if len(self._used_ns) > MAX_CONNECTIONS:
            self._forget(next(iter(self._used_ns)))

    def _on_cut(self, endpoint: str) -> None:
        """The next question goes by a new connection."""
        asyncio.get_running_loop().call_soon(self._forget, endpoint)

    def close_idle(self) -> None:
        """Close connections that were not used for half a minute; called now and then."""
        oldest_ns = self._clock.now_ns() - int(IDLE_S * 1e9)
        for endpoint in [endpoint for endpoint, used_ns in self._used_ns.items() if used_ns < oldest_ns]:
            self._forget(endpoint)

    def _forget(self, endpoint: str) -> None:
        self._used_ns.pop(endpoint, None)
        self._client.disconnect(endpoint)

    def close(self) -> None:
        self._client.close()
