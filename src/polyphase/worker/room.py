"""Whether a worker takes one more request: decided where all frontends' requests meet, so that together they cannot overload it.

    fresh request                  refused while too many wait, or too many prompt tokens wait to be computed; and if many more of
                                   these wait than its router believed when it chose this worker
    handed over or migrated        refused only while too many wait: it has been promised an answer, and others wait for its blocks

A refusal carries the true load, so that the frontend need not guess again. A prompt longer than the limit is taken when nothing waits.
What a router believes is a message old, and of what other routers sent in the meantime it knows nothing: in a burst they would all find the
same worker idle. So the choice is made there and the reservation here, where it is compared with what is true.
"""

from __future__ import annotations

from dataclasses import dataclass

from polyphase.core.errors import Busier, Overloaded
from polyphase.wire.events import Load
from polyphase.wire.requests import Submit

UNFORESEEN_STEP_PARTS = 4  # a quarter of a step's tokens; Source: benchmarks/routing_quality.py, bursts at four frontends
DEFAULT_WAITING_STEPS = 16  # of prompt tokens; enough that an engine never runs dry between two answers to a frontend


@dataclass(frozen=True, slots=True)
class QueueLimits:
    max_waiting_requests: int
    max_waiting_prefill_tokens: int
    max_unforeseen_tokens: int | None = None  # waiting prompt tokens beyond those that the router knew of; None: however many

    @classmethod
    def of_engine(cls, max_batch_tokens: int, max_waiting_requests: int, max_waiting_prefill_tokens: int | None) -> QueueLimits:
        """`None` makes it what the engine computes in 16 steps."""
        waiting = max_waiting_prefill_tokens or DEFAULT_WAITING_STEPS * max_batch_tokens
        return cls(max_waiting_requests, waiting, max_batch_tokens // UNFORESEEN_STEP_PARTS)

    def refuse_if_long(self, load: Load, request_id: str) -> None:
        """Raises: Overloaded if too many requests wait, whatever they are."""
        if load.waiting_count >= self.max_waiting_requests:
            raise Overloaded(f"{load.waiting_count} requests wait for this worker already, which is its limit", request_id=request_id)

    def refuse_if_full(self, request: Submit, load: Load) -> None:
        """Raises: Overloaded, Busier. `load` is of now, with all that was taken before."""
        self.refuse_if_long(load, request.request_id)
        is_fresh = request.offer is None and len(request.token_ids) == request.prompt_token_count
        if is_fresh and load.waiting_prefill_tokens >= self.max_waiting_prefill_tokens:
            raise Overloaded(
                f"{load.waiting_prefill_tokens} prompt tokens wait for this worker already; its limit is {self.max_waiting_prefill_tokens}",
                request_id=request.request_id,
            )
        believed, allowed = request.believed_prefill_tokens, self.max_unforeseen_tokens
        if is_fresh and believed is not None and allowed is not None and load.waiting_prefill_tokens > believed + allowed:
            raise Busier(
                f"{load.waiting_prefill_tokens} prompt tokens wait for this worker; it was chosen when {believed} were known of",
                request_id=request.request_id,
            )
