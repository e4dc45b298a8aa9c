"""The torch engine: `EngineCore` and the model, stepped on an event loop or by hand. The model runs in a thread of the engine's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from polyphase.core.clock import Clock, MonotonicClock
from polyphase.core.ids import ContentKey
from polyphase.engines.batching.core import EngineCore
from polyphase.engines.batching.exports import OfferOrigin
from polyphase.engines.batching.grammars import Grammars
from polyphase.engines.batching.outcome import StepOutcome
from polyphase.engines.batching.scheduler import SchedulerLimits, StepPlan
from polyphase.engines.batching.stepping import StepLoop
from polyphase.engines.interface import BlockSource, PrefixImport, StepReport
from polyphase.engines.torch.execution import execute
from polyphase.engines.torch.runner import ModelRunner
from polyphase.engines.torch.storage import KvStorage
from polyphase.text import Tokenizer
from polyphase.transfer import BlockMemory
from polyphase.wire.cards import ModelCard
from polyphase.wire.events import Load
from polyphase.wire.kv import KvLayout, KvPart
from polyphase.wire.requests import Submit
from polyphase.wire.transfer import AgentCard


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What `assembly` puts together. Owner: the engine closes `storage`, `runner` and `grammars`."""

    card: ModelCard
    storage: KvStorage
    runner: ModelRunner
    tokenizer: Tokenizer
    limits: SchedulerLimits
    lease_ns: int
    grammars: Grammars | None  # None: the card says that it takes none


class TorchEngine:
    """Implements `engines.interface.Engine`, `KvImporter` and `KvExporter`."""

    def __init__(self, parts: EngineParts, clock: Clock | None = None) -> None:
        self._clock = clock or MonotonicClock()
        self._card = parts.card
        self._storage = parts.storage
        self._runner = parts.runner
        self.core = EngineCore(
            card=parts.card,
            storage=parts.storage,
            tokenizer=parts.tokenizer,
            limits=parts.limits,
            lease_ns=parts.lease_ns,
            clock=self._clock,
            grammars=parts.grammars,
        )
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="torch-engine")
        self._loop = StepLoop(self.core, self._clock, self._perform)
        self.core.imports.on_arrival = self._loop.wake
        self._grammars = parts.grammars
        if self._grammars is not None:
            self._grammars.on_ready = self._loop.wake_from_thread
        self._is_closed = False

    @property
    def card(self) -> ModelCard:
        return self._card

    @property
    def device(self) -> torch.device:
        return self._storage.pages.device

    @property
    def dtype(self) -> torch.dtype:
        return self._storage.pages.dtype

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

    def step(self) -> StepReport | None:
        """One step on the calling thread; None if there is nothing to do or to say. Not to be mixed with `run`."""
        if self._grammars is not None:
            self._grammars.wait()
        plan = self.core.begin_step()
        if plan.is_empty:
            return self.core.take_idle_report()
        return self.core.finish_step(execute(plan, self._storage, self._runner), plan)

    async def run(self, on_step: Callable[[StepReport], None]) -> None:
        """Cancel: the step under way is finished and its results are kept, but not reported before the next `run`."""
        await self._loop.run(on_step)

    def _perform(self, plan: StepPlan) -> asyncio.Future[StepOutcome]:
        return asyncio.get_running_loop().run_in_executor(self._thread, execute, plan, self._storage, self._runner)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._thread.shutdown()
        if self._grammars is not None:
            self._grammars.close()
        self._runner.close()
        self._storage.close()

    # KvImporter.

    def open_import(self, request_id: str, namespace: str | None) -> PrefixImport:
        return self.core.imports.open(request_id, namespace)

    # KvExporter.

    @property
    def kv_layout(self) -> KvLayout:
        return self._storage.layout

    def bind_offers(self, *, worker_id: str, epoch: int, endpoint: str, agent: AgentCard, region_id: str) -> None:
        self.core.exports.origin = OfferOrigin(worker_id, epoch, endpoint, agent, region_id)

    def release_lease(self, lease_id: str) -> None:
        self._loop.wake()
        self.core.exports.release(lease_id)

    def find_blocks(self, first_block: int, keys: Sequence[ContentKey]) -> KvPart:
        return self.core.exports.find(first_block, keys)

    @property
    def kv_memory(self) -> BlockMemory:
        return self._storage.shared
