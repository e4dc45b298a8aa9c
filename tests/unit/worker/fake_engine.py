"""A small deterministic engine for tests of the worker: the next token follows from the last one and its place.

Its "KV" of a block are the block's token ids, so that a hand-over that brings wrong bytes is noticed. Some token ids in a prompt make it
misbehave, so that a test in another process can ask for it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from polyphase.core.errors import ContextLengthExceeded, EngineFailed, ModelLoadError, TransferError
from polyphase.core.hashing import sequence_hashes
from polyphase.core.ids import ContentKey
from polyphase.engines.interface import BlockSource, StepReport
from polyphase.transfer import HostMemory, SharedPool, Verdict
from polyphase.wire.cards import ModelCard
from polyphase.wire.events import BlocksStored, KvEvent, Load
from polyphase.wire.kv import KvLayout, KvOffer, KvPart
from polyphase.wire.requests import FinishReason, PhaseStats, SequenceOutput, Submit
from polyphase.wire.transfer import AgentCard
from polyphase.worker.options import EngineOptions

BLOCK_SIZE = 4
BLOCK_BYTES = 4 * BLOCK_SIZE
BLOCK_COUNT = 64
CONTEXT_LENGTH = 200
LAYOUT = KvLayout("float32", 1, 1, 1, BLOCK_SIZE, BLOCK_BYTES, "fake")

CRASH_ON_SUBMIT, CRASH_THE_LOOP, NEVER_ANSWER = 901, 902, 903  # as first token of a prompt


def next_token(token_ids: list[int]) -> int:
    return (token_ids[-1] * 31 + len(token_ids)) % 900


def expected_tokens(prompt: list[int], count: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(count):
        token_ids.append(next_token(token_ids))
    return token_ids[len(prompt) :]


@dataclass
class Sequence:
    request: Submit
    token_ids: list[int]
    stats: PhaseStats = field(default_factory=PhaseStats)
    has_started: bool = False

    @property
    def output_count(self) -> int:
        return len(self.token_ids) - self.request.prompt_token_count


class FakeEngine:
    """Implements Engine and KvExporter."""

    def __init__(self, step_s: float = 0.001) -> None:
        self.step_s = step_s
        self.pool = SharedPool.create(BLOCK_COUNT, BLOCK_BYTES)
        self.running: dict[str, Sequence] = {}
        self.aborted: list[str] = []
        self.leaving: list[str] = []
        self.leases: dict[str, tuple[str, list[int], int]] = {}  # lease id: request, blocks, expiry
        self.free_blocks = list(range(BLOCK_COUNT))
        self.hashes: list[int] = []
        self.is_closed = False
        self.is_asleep = self.will_not_sleep = False
        self._events: list[KvEvent] = []
        self._released: list[KvOffer] = []
        self._lease_ids = itertools.count(1)
        self._step = 0
        self._finished_count = 0
        self._work = asyncio.Event()
        self._identity: tuple[str, int, str, AgentCard, str] | None = None

    @property
    def card(self) -> ModelCard:
        return ModelCard(
            name="fake",
            tokenizer_json=b"{}",
            chat_template=None,
            bos_token=None,
            eos_token=None,
            bos_token_id=None,
            eos_token_ids=[],
            vocab_size=1000,
            context_length=CONTEXT_LENGTH,
            block_size=BLOCK_SIZE,
            block_count=BLOCK_COUNT,
            max_batch_tokens=64,
            max_running=8,
            can_hand_over=True,
            can_sleep=True,
            block_bytes=BLOCK_BYTES,
            engine="fake",
        )

    def submit(self, request: Submit, source: BlockSource | None = None) -> None:
        if len(request.token_ids) >= CONTEXT_LENGTH:
            raise ContextLengthExceeded(f"{len(request.token_ids)} tokens do not fit into {CONTEXT_LENGTH}")
        if request.token_ids[0] == CRASH_ON_SUBMIT:
            raise RuntimeError("a bug in submit")
        sequence = Sequence(request, list(request.token_ids))
        if request.offer is not None and source is not None and request.token_ids[0] != NEVER_ANSWER:
            sequence.stats = self._pull(request, request.offer, source)
        self.running[request.request_id] = sequence
        self._work.set()

    def _pull(self, request: Submit, offer: KvOffer, source: BlockSource) -> PhaseStats:
        data = bytearray(len(offer.block_ids) * BLOCK_BYTES)
        try:
            verdicts = source.read_blocks(offer.block_ids, offer.generations, HostMemory(data, BLOCK_BYTES), range(len(offer.block_ids)))
        except TransferError:
            return PhaseStats()
        finally:
            self._released.append(offer)
        assert set(verdicts) == {Verdict.DONE}
        assert array("I", bytes(data)).tolist() == request.token_ids[: len(offer.block_ids) * BLOCK_SIZE]
        return PhaseStats(transferred_token_count=offer.token_count, transferred_bytes=len(data))

    async def sleep(self) -> None:
        assert not self.running
        if self.will_not_sleep:
            raise EngineFailed("no")
        self.is_asleep = True

    async def wake(self) -> None:
        self.is_asleep = False

    def hand_over(self, request_id: str) -> None:
        self.leaving.append(request_id)
        self._work.set()

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        for lease_id in [lease_id for lease_id, (owner, _, _) in self.leases.items() if owner == request_id]:
            self.release_lease(lease_id)
        self._work.set()

    def load(self) -> Load:
        leased = sum(len(blocks) for _, blocks, expires_at_ns in self.leases.values() if expires_at_ns > time.monotonic_ns())
        return Load(
            step=self._step,
            running_count=len(self.running),
            block_count=BLOCK_COUNT,
            used_block_count=leased,
            leased_block_count=leased,
            finished_total=self._finished_count,
        )

    async def run(self, on_step: Callable[[StepReport], None]) -> None:
        while True:
            await self._work.wait()
            await asyncio.sleep(self.step_s)
            self._step += 1
            outputs = [SequenceOutput(request_id=request_id, finish_reason=FinishReason.CANCELLED) for request_id in self._aborted_now()]
            outputs += [output for sequence in list(self.running.values()) if (output := self._advance(sequence))]
            outputs += [self._part_with(self.running.pop(request_id)) for request_id in self.leaving if request_id in self.running]
            self.leaving.clear()
            report = StepReport(self._step, outputs, self._events, self._released)
            self._events, self._released = [], []
            on_step(report)
            if all(sequence.token_ids[0] == NEVER_ANSWER for sequence in self.running.values()):
                self._work.clear()

    def _aborted_now(self) -> list[str]:
        found = [request_id for request_id in self.aborted if self.running.pop(request_id, None)]
        self.aborted.clear()
        return found

    def _advance(self, sequence: Sequence) -> SequenceOutput | None:
        request = sequence.request
        if request.token_ids[0] == CRASH_THE_LOOP:
            raise RuntimeError("a bug in the engine's loop")
        if request.token_ids[0] == NEVER_ANSWER:
            return None
        token = next_token(sequence.token_ids)
        stats = None if sequence.has_started else sequence.stats
        if not sequence.has_started:
            new = [hash_ for hash_ in sequence_hashes(request.token_ids, BLOCK_SIZE) if hash_ not in self.hashes]
            if new:
                self.hashes += new
                self._events.append(BlocksStored([int(hash_) for hash_ in new]))
        sequence.has_started = True
        sequence.token_ids.append(token)
        reason, offer = None, None
        if sequence.output_count >= request.stop.max_tokens or len(sequence.token_ids) >= CONTEXT_LENGTH:
            reason = FinishReason.LENGTH
        elif request.hand_over:
            reason, offer = FinishReason.HANDED_OVER, self._offer(request, request.token_ids)
        if reason is not None:
            del self.running[request.request_id]
            self._finished_count += 1
        return SequenceOutput(request_id=request.request_id, token_ids=[token], finish_reason=reason, offer=offer, stats=stats)

    def _part_with(self, sequence: Sequence) -> SequenceOutput:
        offer = self._offer(sequence.request, sequence.token_ids[:-1]) if sequence.has_started else sequence.request.offer
        return SequenceOutput(request_id=sequence.request.request_id, finish_reason=FinishReason.HANDED_OVER, offer=offer)

    def _offer(self, request: Submit, token_ids: list[int]) -> KvOffer:
        assert self._identity is not None
        worker_id, epoch, endpoint, agent, region_id = self._identity
        full = len(token_ids) // BLOCK_SIZE
        blocks = [self.free_blocks.pop(0) for _ in range(full)]
        self.pool.renew(blocks)
        for place, block in enumerate(blocks):
            content = array("I", token_ids[place * BLOCK_SIZE : (place + 1) * BLOCK_SIZE]).tobytes()
            self.pool.blocks[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = content
        lease_id = f"lease-{next(self._lease_ids)}"
        expires_at_ns = time.monotonic_ns() + 60 * 10**9
        self.leases[lease_id] = (request.request_id, blocks, expires_at_ns)
        generations = self.pool.generations(blocks)
        return KvOffer(worker_id, epoch, endpoint, lease_id, expires_at_ns, agent, region_id, blocks, generations, full * BLOCK_SIZE)

    def close(self) -> None:
        self.is_closed = True
        self.pool.close()

    @property
    def kv_memory(self) -> SharedPool:
        return self.pool

    @property
    def kv_layout(self) -> KvLayout:
        return LAYOUT

    def bind_offers(self, *, worker_id: str, epoch: int, endpoint: str, agent: AgentCard, region_id: str) -> None:
        self._identity = (worker_id, epoch, endpoint, agent, region_id)

    def find_blocks(self, first_block: int, keys: list[ContentKey]) -> KvPart:
        """It has no prefix cache."""
        assert self._identity is not None
        _, _, _, agent, region_id = self._identity
        return KvPart(first_block, [], [], agent, region_id)

    def release_lease(self, lease_id: str) -> None:
        _, blocks, _ = self.leases.pop(lease_id, ("", [], 0))
        self.free_blocks += blocks


def load(options: EngineOptions) -> FakeEngine:
    """For `--engine tests.unit.worker.fake_engine:load`. The model's name says how it behaves."""
    match options.model:
        case "missing":
            raise ModelLoadError("there is no folder 'missing' with a model")
        case "slow-to-load":
            time.sleep(600)
        case "broken":
            raise RuntimeError("a bug while loading")
        case "full-disk":
            engine = FakeEngine()
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return engine
    return FakeEngine(step_s=float(os.environ.get("FAKE_STEP_S", "0.001")))
