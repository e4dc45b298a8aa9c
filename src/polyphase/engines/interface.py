"""What a worker asks of an engine, whether it computes in this process or is a server elsewhere.

`Engine` is what all must do: tokens in, tokens out, abort, load, and a card with capacity, block size and limits. Abilities that not all
have are Protocols of their own, such as `KvExporter`, announced by the card. `polyphase.testing.engines` has the tests that all must pass.

An engine is driven on the worker's event loop: `submit` and `abort` are called between steps or during one, never from another
thread, and return at once. `run` performs steps until it is cancelled and reports each one. Heavy work happens in a thread of the
engine's own, so that the loop is never blocked for longer than a bookkeeping step.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from polyphase.core.ids import ContentKey
from polyphase.transfer import BlockMemory
from polyphase.wire.cards import ModelCard
from polyphase.wire.events import KvEvent, Load
from polyphase.wire.kv import KvLayout, KvPart, Offer
from polyphase.wire.requests import Forward, SequenceOutput, Submit
from polyphase.wire.transfer import AgentCard


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one engine step brought. `released_offers` are offers whose KV was fetched or given up: their leases can go."""

    step: int
    outputs: list[SequenceOutput]
    events: list[KvEvent] = field(default_factory=list)
    released_offers: list[Offer] = field(default_factory=list)


class BlockSource(Protocol):
    """Blocks of another worker, opened and ready to be read."""

    def read_blocks(self, block_ids: Sequence[int], generations: Sequence[int], into: BlockMemory, places: Sequence[int]) -> bytes:
        """Copy whole blocks into the blocks `places` of `into`.

        Returns: a `transfer.Verdict` for each block; what is not DONE must not be used.
        Raises: TransferError if nothing could be read; what was written must then not be used.
        """


@dataclass(frozen=True, slots=True)
class Room:
    """Own blocks that may be written now: for blocks `first_block` and following of a prefix."""

    first_block: int
    block_ids: Sequence[int]


class PrefixImport(Protocol):
    """KV of one request to come, on its way into this engine's prefix cache. All calls on the engine's loop.

    Owner: whoever opened it closes it; what has arrived stays cached. Each room is settled exactly once, after `close` too.
    """

    def extend(self, token_ids: Sequence[int]) -> None:
        """The prompt goes on with these tokens."""

    def missing(self) -> tuple[int, Sequence[ContentKey]]:
        """Number of the first full block that is not here, and the keys of it and all that follow; no keys: all are here."""

    def reserve(self, first_block: int, end_block: int) -> Room | None:
        """Room for some of the first missing blocks, up to `end_block`; never waits.

        None: all are there, or blocks before `first_block` are missing, or others need the memory more.
        """

    def settle(self, room: Room, good_count: int) -> None:
        """The first `good_count` blocks of the room hold what belongs there, and nobody writes to any of them any more."""

    def note_wait(self, duration_ms: float) -> None:
        """The request was there, and waited so long for its blocks."""

    def close(self) -> None:
        """Idempotent."""


@runtime_checkable
class KvImporter(Protocol):
    """Optional ability: blocks of other workers are taken in beside the steps, ahead of the request that wants them."""

    def open_import(self, request_id: str, namespace: str | None) -> PrefixImport:
        """`namespace`: of the request, `core.hashing.namespace_of`."""


class Engine(Protocol):
    """Tokens in, tokens out."""

    @property
    def card(self) -> ModelCard: ...

    def submit(self, request: Submit, source: BlockSource | None = None) -> None:
        """Accept a request; its tokens appear in later step reports.

        `source` comes with a `KvOffer` in `request.offer`, already opened; without it, the engine computes the offered part itself. An
        `EngineOffer` is there only if it is of the card's `offer_kind`: the engine releases it in a report once it has what it offers.

        Raises: RequestError if it can never run here; Refused if not now. Then nothing was kept.
        """

    def abort(self, request_id: str) -> None:
        """End a request, free its blocks and its lease. The next report carries its `cancelled` output; unknown ids are ignored."""

    def hand_over(self, request_id: str) -> None:
        """End a request so that it goes on elsewhere.

        After the step under way a report carries its `handed_over` output, with an offer of all blocks that it has computed, if others can
        read them; a request that still waits with somebody else's offer gives that back unread. One that was submitted with `hand_over`
        and is being computed leaves by itself when its prompt is done; unknown ids are ignored.
        """

    def load(self) -> Load: ...

    async def run(self, on_step: Callable[[StepReport], None]) -> None:
        """Step until cancelled; `on_step` is called on the loop after each step, also for steps that only free or cancel.

        A step that raises ends each request that it held in an `error` output and the engine goes on. A step counts only what the engine
        did: frontends take a worker whose steps stand still for stuck.

        Raises: EngineFailed if the engine has ended for good; then the worker ends too, and says why.
        Cancel: what runs is kept for the next `run` or forgotten, as the engine says; whoever cancels answers for it.
        """

    def close(self) -> None:
        """Free memory, threads and files. Not called while `run` is active."""


@runtime_checkable
class KvExporter(Protocol):
    """Optional ability: other workers can read this engine's blocks."""

    @property
    def kv_memory(self) -> BlockMemory:
        """Where the blocks lie, to be registered with a transfer agent; stays the engine's own."""

    @property
    def kv_layout(self) -> KvLayout: ...

    def bind_offers(self, *, worker_id: str, epoch: int, endpoint: str, agent: AgentCard, region_id: str) -> None:
        """Tell the engine what to write into the offers it makes; called once, before `run`."""

    def release_lease(self, lease_id: str) -> None:
        """Unpin the blocks of a lease; unknown ids (released, run out) are ignored."""

    def find_blocks(self, first_block: int, keys: Sequence[ContentKey]) -> KvPart:
        """Where the first of these lie, as far as the prefix cache has them; they are forgotten last now, but not kept."""


@runtime_checkable
class KvSender(Protocol):
    """Optional ability: the engine brings KV to others of its kind by itself. What it hands over are `EngineOffer`s."""

    def bind_offers(self, *, worker_id: str, epoch: int, endpoint: str) -> None:
        """Tell the engine what to write into the offers it makes; called once, before `run`."""

    def release_lease(self, lease_id: str) -> None:
        """The reader has what was offered, or nobody wants it: what is still computed for it ends. Unknown ids are ignored."""


@runtime_checkable
class Sleeper(Protocol):
    """Optional ability: the engine gives the accelerator's memory free, and takes it back, without being started anew."""

    async def sleep(self) -> None:
        """Called when nothing runs. What was cached is gone. Raises: EngineFailed if it will not."""

    async def wake(self) -> None:
        """Raises: EngineFailed if it will not."""


@runtime_checkable
class Forwarder(Protocol):
    """Optional ability: bodies of requests go to the engine as they are, of the kinds that its card `passes`.

    Answers are outputs in step reports: pieces (`SequenceOutput.passed`) in order, then a finish reason. `abort` ends one; `hand_over`
    does as well while nothing of its answer was reported. Not more than the request's window is kept or on its way at a time.
    """

    def forward(self, request: Forward) -> None:
        """Raises: RequestError if it can never run here; Refused if not now. Then nothing was kept."""

    def read_on(self, request_id: str, byte_count: int) -> None:
        """So much of its answer was read, so that as much more may come. Unknown ids are ignored."""


class Ability(enum.StrEnum):
    """What not every engine can; `polyphase status` shows which a worker has."""

    KV_EVENTS = "kv-events"  # it tells which blocks it holds
    HAND_OVER = "hand-over"  # `KvExporter` or `KvSender`: its KV goes to other workers
    PRIORITY = "priority"
    SLEEP = "sleep"  # `Sleeper`
    PASS_THROUGH = "pass-through"  # `Forwarder`: images, embeddings and other requests go to it as bodies
    STRUCTURED_OUTPUT = "structured-output"  # it keeps to grammars
    RESUMED_GRAMMARS = "resumed-grammars"  # also of requests that began elsewhere
    LORA = "lora"  # it runs adapters
    EXACT_MIGRATION = "exact-migration"  # sampled requests go on with the same tokens; greedy ones do everywhere


def abilities_of(engine: Engine) -> list[Ability]:
    card = engine.card
    has = {
        Ability.KV_EVENTS: card.publishes_events,
        Ability.HAND_OVER: card.can_hand_over,
        Ability.PRIORITY: card.keeps_priorities,
        Ability.SLEEP: card.can_sleep,
        Ability.PASS_THROUGH: bool(card.passes),
        Ability.STRUCTURED_OUTPUT: card.takes_grammars,
        Ability.RESUMED_GRAMMARS: card.takes_grammars and card.resumes_grammars,
        Ability.LORA: bool(card.adapters),
        Ability.EXACT_MIGRATION: card.resumes_sampling,
    }
    return [ability for ability, is_there in has.items() if is_there]
