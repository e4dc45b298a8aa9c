"""What a request would cost at a worker, in tokens of prefill: the one currency in which cached prefixes and load are weighed.

    cost = tokens to compute for this request          (prompt less what is cached there; on a decode leg: moved, not computed)
         + prefill tokens queued ahead of it
         + DECODE_WEIGHT x tokens of KV in use there   (every one of them is read in each decode step)
         + tokens for which the pool has no room       (they will wait, or push somebody out)

A shared system prompt therefore draws requests to the worker that holds it until the queue and the sequences there outweigh it; then
the next request goes elsewhere, computes it there, and from then on there are two such workers.
"""

from __future__ import annotations

from polyphase.router.types import Leg, RouteRequest, WorkerView

# A KV token in use slows every later step a little; computing a token takes its full time once. A quarter lets about four sequences
# decode on a worker before leaving its cache is worth recomputing the prompt.
DECODE_WEIGHT = 0.25
# Blocks that come from a prefill worker are copied, not computed.
MOVE_WEIGHT = 0.05
# Many clients leave max_tokens at the model's maximum, so it says little about the length of the answer; this much of it is booked.
ASSUMED_OUTPUT_TOKENS = 128


def uncached_tokens(request: RouteRequest, worker: WorkerView) -> int:
    """Prompt tokens that must be computed; at least one, because the last token's output is wanted even if all is cached."""
    return max(request.prompt_token_count - worker.overlap_block_count * worker.facts.block_size, min(request.prompt_token_count, 1))


def block_count_needed(request: RouteRequest, block_size: int, leg: Leg) -> int:
    output_tokens = 0 if leg is Leg.PREFILL else min(request.max_output_tokens, ASSUMED_OUTPUT_TOKENS)
    return -(-(request.prompt_token_count + output_tokens) // block_size)


def queued_prefill_tokens(worker: WorkerView) -> int:
    """Prefill ahead of a new request. Ours is known from bookings, that of other frontends from the worker's report."""
    reported = worker.load.waiting_prefill_tokens if worker.load else 0
    return max(worker.booked_prefill_tokens, reported + worker.unreported_prefill_tokens)


def used_block_count(worker: WorkerView) -> int:
    reported = worker.load.used_block_count if worker.load else 0
    return max(worker.booked_block_count, reported + worker.unreported_block_count)


def load_tokens(request: RouteRequest, leg: Leg, worker: WorkerView) -> float:
    """What the worker has to do besides this request."""
    used = used_block_count(worker)
    lacking = max(used + block_count_needed(request, worker.facts.block_size, leg) - worker.facts.block_count, 0)
    return queued_prefill_tokens(worker) + worker.facts.block_size * (DECODE_WEIGHT * used + lacking)


def request_tokens(request: RouteRequest, leg: Leg, worker: WorkerView) -> float:
    """What the worker has to do for this request before its first token there."""
    weight = MOVE_WEIGHT if leg is Leg.DECODE else 1.0
    return weight * uncached_tokens(request, worker)
