"""What a frontend does towards workers, without the HTTP: submits, collects outputs, follows the event stream."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from polyphase.core.digest import digest_sum
from polyphase.runtime import AskedHistory, EventSubscriber, Registry, WorkerClient
from polyphase.wire.cards import WorkerEntry
from polyphase.wire.events import BlocksStored, Digests, KvEvent, Load, Tier, TierDigest
from polyphase.wire.kv import Offer
from polyphase.wire.requests import (
    SamplingParams,
    SequenceOutput,
    StepOutputs,
    StopConditions,
    Submit,
)
from tests.unit.runtime.waiting import eventually

_numbers = itertools.count()


class Peer:
    def __init__(self) -> None:
        self.client = WorkerClient(self._on_outputs, "test")
        self.events = EventSubscriber(self, AskedHistory(self.client))
        self.reports: list[StepOutputs] = []
        self.outputs: defaultdict[str, list[SequenceOutput]] = defaultdict(list)
        self.hashes: dict[str, set[int]] = {}
        self.loads: dict[str, Load] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Peer:
        self._tasks = [asyncio.create_task(self.client.run()), asyncio.create_task(self.events.run())]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self.client.close()
        self.events.close()

    def connect(self, entry: WorkerEntry) -> None:
        self.client.connect(entry.worker_id, entry.request_endpoint)
        self.events.connect(entry)

    async def find(self, run_folder: Path, worker_id: str = "w") -> WorkerEntry:
        """Wait until the worker is in the registry, and connect to it."""
        registry = Registry(run_folder)
        await eventually(lambda: worker_id in [entry.worker_id for entry in registry.entries()], timeout_s=60)
        entry = next(entry for entry in registry.entries() if entry.worker_id == worker_id)
        self.connect(entry)
        return entry

    def submit(
        self,
        worker_id: str,
        prompt: list[int],
        max_tokens: int = 5,
        *,
        hand_over: bool = False,
        offer: Offer | None = None,
        emitted: int = 0,
        request_id: str | None = None,
        remaining_ms: int | None = None,
    ) -> str:
        """The last `emitted` tokens of `prompt` are output already."""
        request_id = request_id or f"r{next(_numbers)}"
        request = Submit(
            request_id=request_id,
            token_ids=prompt,
            prompt_token_count=len(prompt) - emitted,
            sampling=SamplingParams(seed=1, temperature=0),
            stop=StopConditions(max_tokens=max_tokens),
            hand_over=hand_over,
            offer=offer,
            remaining_ms=remaining_ms,
        )
        self.client.send(worker_id, request)
        return request_id

    async def last(self, request_id: str) -> SequenceOutput:
        """The terminal output, once it is there."""
        await eventually(lambda: self.outputs[request_id] and self.outputs[request_id][-1].finish_reason)
        return self.outputs[request_id][-1]

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.token_ids]

    def _on_outputs(self, report: StepOutputs) -> None:
        self.reports.append(report)
        for output in report.outputs:
            earlier = self.outputs[output.request_id]
            assert not earlier or earlier[-1].finish_reason is None, "an output after the last one"
            earlier.append(output)

    def on_reset(self, worker_id: str, epoch: int) -> None:
        self.hashes[worker_id] = set()

    def on_held(self, worker_id: str, epoch: int, tier: Tier, hashes: Iterable[int]) -> None:
        self.hashes[worker_id].update(hashes)

    def on_events(self, worker_id: str, epoch: int, events: list[KvEvent]) -> None:
        for event in events:
            assert isinstance(event, BlocksStored)
            self.hashes[worker_id].update(event.sequence_hashes)

    def on_load(self, worker_id: str, epoch: int, load: Load) -> None:
        self.loads[worker_id] = load

    def digests(self, worker_id: str, epoch: int) -> Digests:
        held = self.hashes[worker_id]
        return {Tier.DEVICE: TierDigest(len(held), digest_sum(held))} if held else {}
