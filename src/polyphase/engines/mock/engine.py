"""The mock engine on an event loop: steps end when the imagined accelerator would have ended them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from polyphase.core.clock import Clock, MonotonicClock
from polyphase.core.errors import KvError
from polyphase.core.ids import ContentKey
from polyphase.engines.batching.exports import OfferOrigin
from polyphase.engines.batching.outcome import StepOutcome
from polyphase.engines.batching.scheduler import StepPlan
from polyphase.engines.batching.stepping import StepLoop
from polyphase.engines.interface import BlockSource, PrefixImport, StepReport
from polyphase.engines.mock.assembly import assemble_mock
from polyphase.engines.mock.machine import MockMachine, MockParts
from polyphase.engines.mock.settings import MockSettings
from polyphase.transfer import SharedPool
from polyphase.wire.cards import ModelCard
from polyphase.wire.events import Load
from polyphase.wire.kv import KvLayout, KvPart
from polyphase.wire.requests import Submit
from polyphase.wire.transfer import AgentCard

_LATENESS_NS = 5_000_000  # a step that begins this soon after the last one's end counts as following it without a gap


def load_mock_engine(settings: MockSettings) -> MockEngine:
    """Raises: ModelLoadError, ConfigurationError. Owner: the caller closes the engine."""
    return MockEngine(assemble_mock(settings, is_shared=True))


class MockEngine:
    """Implements `engines.interface.Engine`, `KvExporter` and `KvImporter`; what is imported takes no time."""

    def __init__(self, parts: MockParts, clock: Clock | None = None) -> None:
        self._clock = clock or MonotonicClock()
        self.machine = MockMachine(parts, self._clock)
        self.core = self.machine.core
        self._loop = StepLoop(self.core, self._clock, self._perform)
        self.core.imports.on_arrival = self._loop.wake
        self._due_ns = 0  # when the last step should have ended

    @property
    def card(self) -> ModelCard:
        return self.machine.card

    def submit(self, request: Submit, source: BlockSource | None = None) -> None:
        self._loop.wake()
        self.core.submit(request, source)

    def abort(self, request_id: str) -> None:
        self._loop.wake()
        self.core.abort(request_id)

    def hand_over(self, request_id: str) -> None:
        self._loop.wake()
        self.core.hand_over(request_id)

    def load(self) -> Load:
        return self.core.load()

    async def run(self, on_step: Callable[[StepReport], None]) -> None:
        """Cancel: the step under way is finished and its results are kept, but not reported before the next `run`."""
        await self._loop.run(on_step)

    def _perform(self, plan: StepPlan) -> asyncio.Future[StepOutcome]:
        return asyncio.ensure_future(self._take_time(plan))

    async def _take_time(self, plan: StepPlan) -> StepOutcome:
        now_ns = self._clock.now_ns()
        # Timers end late, by a millisecond or so. Counting from when the last step should have ended keeps that from adding up.
        begun_ns = self._due_ns if now_ns - self._due_ns < _LATENESS_NS else now_ns
        self._due_ns = begun_ns + self.machine.duration_ns(plan)
        outcome = self.machine.execute(plan)
        await asyncio.sleep(max(0, self._due_ns - self._clock.now_ns()) / 1e9)
        return outcome

    def close(self) -> None:
        self.machine.storage.close()

    # KvImporter.

    def open_import(self, request_id: str, namespace: str | None) -> PrefixImport:
        return self.core.imports.open(request_id, namespace)

    # KvExporter.

    @property
    def kv_layout(self) -> KvLayout:
        return self.machine.storage.layout

    def bind_offers(self, *, worker_id: str, epoch: int, endpoint: str, agent: AgentCard, region_id: str) -> None:
        self.core.exports.origin = OfferOrigin(worker_id, epoch, endpoint, agent, region_id)

    def release_lease(self, lease_id: str) -> None:
        self._loop.wake()
        self.core.exports.release(lease_id)

    def find_blocks(self, first_block: int, keys: Sequence[ContentKey]) -> KvPart:
        return self.core.exports.find(first_block, keys)

    @property
    def kv_memory(self) -> SharedPool:
        if self.machine.storage.shared is None:
            raise KvError("this mock engine was made without shared memory: no other process can read its blocks")
        return self.machine.storage.shared
