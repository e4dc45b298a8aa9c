"""One sequence on its way through the workers: what is known of it here, and which worker has it now.

        token_ids   | prompt | emitted so far |     what any worker needs to go on

Only the dispatcher changes a flight, with `sending` and `waiting`.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from polyphase.core.hashing import namespace_of, sequence_hashes
from polyphase.core.ids import Epoch, RequestId, SequenceHash, WorkerId
from polyphase.frontend.hints import NO_HINTS, RoutingHints
from polyphase.frontend.history import Attempt, Setback
from polyphase.frontend.inbox import Inbox
from polyphase.frontend.metrics import ModelMetrics
from polyphase.frontend.passing import WINDOW_BYTES, Passing
from polyphase.frontend.predictions import Prediction
from polyphase.frontend.records import SequenceRecord
from polyphase.router import Route
from polyphase.wire.cards import Role
from polyphase.wire.kv import KvPart, Offer
from polyphase.wire.requests import Forward, Grammar, KvHolder, PhaseStats, PullAhead, SamplingParams, StopConditions, Submit

if TYPE_CHECKING:
    from polyphase.frontend.waiting_room import Party

NO_ID, NOBODY, NEVER = RequestId(""), WorkerId(""), Epoch(0)


@dataclass(frozen=True, slots=True)
class Job:
    """What a sequence is to be; does not change on its way."""

    sequence_id: RequestId
    index: int  # of the choice it becomes
    model: str
    block_size: int
    prompt_ids: list[int]
    hashes: list[SequenceHash]  # of the prompt's full blocks
    sampling: SamplingParams
    stop: StopConditions
    cache_salt: str | None = None
    priority: int = 0
    hints: RoutingHints = NO_HINTS
    grammar: Grammar | None = None
    lora: str | None = None  # adapter of the model
    passing: Passing | None = None  # it is no tokens but a body, for an engine that takes it; `prompt_ids` is empty then

    @property
    def namespace(self) -> str | None:
        return namespace_of(self.cache_salt, self.lora)

    @property
    def prompt_token_count(self) -> int:
        """A guess for one that is passed through."""
        return len(self.prompt_ids) if self.passing is None else self.passing.prompt_token_count


class Stage(enum.Enum):
    PREFILL = "prefill"  # at a prefill worker, which will hand it over
    SERVING = "serving"  # at the worker that finishes it
    WAITING = "waiting"  # no worker had room for it yet, or once more
    OVER = "over"


@dataclass(slots=True)
class Flight:
    job: Job
    inbox: Inbox
    record: SequenceRecord
    metrics: ModelMetrics
    deadline_ns: int  # nobody awaits it later
    leave_by_ns: int | None  # it must be with a worker by then; None: an answer was promised, and it waits until its deadline
    stage: Stage = Stage.WAITING
    emitted: list[int] = field(default_factory=list)
    wire_id: RequestId = NO_ID  # of the current attempt: late news of an earlier one cannot be taken for its own
    worker_id: WorkerId = NOBODY  # who has it now
    epoch: Epoch = NEVER
    route: Route | None = None
    offer: Offer | None = None  # KV for it that nobody is known to have taken yet
    holder: WorkerId | None = None  # of blocks that the worker that has it now may pull
    attempts: int = 0
    tried: set[tuple[WorkerId, Epoch]] = field(default_factory=set)  # lives of workers that failed it
    avoided: set[WorkerId] = field(
        default_factory=set
    )  # unless there is no other: whose role has just changed, whose connection broke, or who stood still
    is_leaving: bool = False  # the worker was asked to hand it over
    roles: dict[WorkerId, Role] = field(default_factory=dict)  # of the workers of the route, as known when it was chosen
    waits_until_ns: int = 0  # for a worker to join, when none is left
    deadline: asyncio.TimerHandle | None = None
    party: Party | None = None  # while it waits in the queue
    predictions: dict[WorkerId, Prediction] = field(default_factory=dict)  # of the current attempt, not reported yet
    sent_ns: int = 0  # to the worker that has it now
    answered_ns: int = 0  # its first tokens there, or its end; 0: none yet
    failure_count: int = 0  # workers that died, failed or stood still with it: after some, it is taken for the cause
    has_answered: bool = False  # of one that is passed through: the client has part of an answer that nobody else can finish
    cut_from: tuple[WorkerId, Epoch] | None = None  # whose connection broke last, perhaps because it was dying
    other_hashes: dict[int, list[SequenceHash]] = field(default_factory=dict)  # of the prompt, by other block sizes than the job's

    @property
    def is_over(self) -> bool:
        return self.stage is Stage.OVER

    @property
    def remaining_tokens(self) -> int:
        return self.job.stop.max_tokens - len(self.emitted)

    def token_ids(self) -> list[int]:
        return self.job.prompt_ids + self.emitted if self.emitted else self.job.prompt_ids

    def hashes(self, block_size: int) -> list[SequenceHash]:
        """Of the full blocks of prompt and output; the prompt's are not computed again."""
        job, of_prompt = self.job, self.prompt_hashes(block_size)
        if not self.emitted:
            return of_prompt
        done = len(of_prompt) * block_size
        parent = of_prompt[-1] if of_prompt else None
        return of_prompt + sequence_hashes(self.token_ids()[done:], block_size, job.namespace, parent)

    def prompt_hashes(self, block_size: int) -> list[SequenceHash]:
        if block_size == self.job.block_size:
            return self.job.hashes
        hashes = self.other_hashes.get(block_size)
        if hashes is None:
            hashes = self.other_hashes[block_size] = sequence_hashes(self.job.prompt_ids, block_size, self.job.namespace)
        return hashes

    def submit(
        self,
        now_ns: int,
        *,
        hand_over: bool = False,
        with_parts: bool = False,
        offer: Offer | None = None,
        holder: KvHolder | None = None,
        believed_prefill_tokens: int | None = None,
    ) -> Submit:
        job = self.job
        return Submit(
            request_id=self.wire_id,
            token_ids=self.token_ids(),
            prompt_token_count=len(job.prompt_ids),
            sampling=job.sampling,
            stop=job.stop,
            cache_salt=job.cache_salt,
            grammar=job.grammar,
            lora=job.lora,
            priority=job.priority,
            hand_over=hand_over,
            with_parts=with_parts,
            offer=offer,
            holder=holder,
            for_role=self.roles.get(self.worker_id),
            believed_prefill_tokens=believed_prefill_tokens,
            remaining_ms=self._remaining_ms(now_ns),
        )

    def forward(self, passing: Passing, now_ns: int) -> Forward:
        return Forward(
            request_id=self.wire_id,
            kinds=passing.kinds,
            body=passing.body,
            content_type=passing.content_type,
            model=passing.model,
            lora=self.job.lora,
            model_span=passing.model_span,
            headers=passing.headers,
            wants_stream=passing.wants_stream,
            window=WINDOW_BYTES,
            prompt_token_count=passing.prompt_token_count,
            priority=self.job.priority,
            remaining_ms=self._remaining_ms(now_ns),
        )

    def _remaining_ms(self, now_ns: int) -> int:
        return max((self.deadline_ns - now_ns) // 1_000_000, 1)

    def pull_ahead(self, part: KvPart) -> PullAhead:
        assert self.route is not None
        assert self.route.prefill is not None
        size = self.route.prefill.block_size
        token_ids = self.token_ids()[part.first_block * size : (part.first_block + len(part.block_ids)) * size]
        return PullAhead(self.wire_id, token_ids, part, self.job.cache_salt, self.job.lora)

    def predict(self, route: Route, now_ns: int, removed_block_count: Callable[[WorkerId], int]) -> None:
        """What is expected of each leg, to be compared with what its engine reports. A migrated sequence counts as its prompt."""
        job = self.job
        self.predictions = {
            place.worker_id: Prediction(
                worker_id=place.worker_id,
                epoch=place.epoch,
                routed_ns=now_ns,
                hashes=self.prompt_hashes(place.block_size),
                prompt_tokens=len(job.prompt_ids),
                predicted=min(place.overlap_block_count * place.block_size, len(job.prompt_ids)),
                removed_before=removed_block_count(place.worker_id),
                is_salted=job.namespace is not None,
            )
            for place in (route.prefill, route.decode)
            if place is not None
        }

    # For people who ask why

    def note_route(self, route: Route, now_ns: int, *, is_split: bool) -> None:
        token_count = self.job.prompt_token_count + len(self.emitted)
        self.record.history.add(Attempt(route, now_ns, token_count, is_split))

    def note_stats(self, stats: PhaseStats, now_ns: int) -> None:
        record, is_prefill = self.record, self.stage is Stage.PREFILL
        record.note_stats(stats)
        record.history.attempts[-1].note_stats(stats, of_prefill_leg=is_prefill)
        if stats.transferred_token_count:
            source = "" if self.holder is None else f" from {self.holder}"
            took = f"{stats.transferred_token_count} tokens of KV{source} in {stats.transfer_ms:.1f} ms"
            record.history.note(now_ns, "transferred", self.worker_id, took)

    def set_back(self, now_ns: int, event: str, cause: str, detail: str | None = None) -> None:
        """Its worker will not finish it. `detail` for the timeline, if it is another than the cause."""
        self.record.history.attempts[-1].setback = Setback(event, self.worker_id, cause)
        self.record.history.note(now_ns, event, self.worker_id, detail or cause)

    def note_break(self, now_ns: int, cause: str) -> None:
        self.set_back(now_ns, "broken off", cause)
