"""What a request would cost at a worker, in tokens of prefill: the one currency in which cached prefixes and load are weighed.

    cost = COMPUTE_WEIGHT x tokens to compute for this request  (prompt less what is cached there or on its way; on a decode leg
                                                                 they are moved: MOVE_WEIGHT)
         + prefill tokens queued ahead of it         ┐
         + DECODE_WEIGHT x tokens of KV in use there ┘ load, whatever the request (every KV token is read in each decode step)
         + tokens for which the pool has no room       (they will wait, or push somebody out)

A shared system prompt therefore draws requests to the worker that holds it until the queue and the sequences there outweigh it; then
the next request goes elsewhere, computes it there, and from then on there are two such workers.
"""

from __future__ import annotations

from polyphase.router.types import Leg, RouteRequest, WorkerView

# A token of the queue delays this request. One that is computed a second time also delays all that come after it, and takes the place of
# something else in a cache: so leaving a cached prefix must save three times the tokens that it costs. Source: benchmarks/
# routing_quality.py; of the weights from 1 to 4, 3 had the shortest p99 of TTFT on a trace near saturation, and 2 on chats, by 5 %.
COMPUTE_WEIGHT = 3.0
# A KV token in use slows every later step a little; computing a token takes its full time once.
DECODE_WEIGHT = 0.25
# Blocks that come from a prefill worker are copied, not computed.
MOVE_WEIGHT = 0.05
# Many clients leave max_tokens at the model's maximum, so it says little about the length of the answer; this much of it is booked.
ASSUMED_OUTPUT_TOKENS = 128


def uncached_tokens(request: RouteRequest, worker: WorkerView) -> int:
    """Prompt tokens that must be computed."""
    return max(request.prompt_token_count - worker.overlap_block_count * worker.facts.block_size, uncached_at_least(request))


def uncached_at_least(request: RouteRequest) -> int:
    """One token, because the last one's output is wanted even if all is cached."""
    return min(request.prompt_token_count, 1)


def tokens_needed(request: RouteRequest, leg: Leg) -> int:
    """Tokens whose KV the request will fill there, as far as one can say."""
    output_tokens = 0 if leg is Leg.PREFILL else min(request.max_output_tokens, ASSUMED_OUTPUT_TOKENS)
    return request.prompt_token_count + output_tokens


def block_count_needed(request: RouteRequest, block_size: int, leg: Leg) -> int:
    return -(-tokens_needed(request, leg) // block_size)


def queued_prefill_tokens(worker: WorkerView) -> int:
    """Prefill ahead of a new request: as the worker reported it, and what we sent there since.

    A booking alone would count a long prompt in full until its first token, when all but a little of it may be computed.
    """
    if worker.load is None:
        return worker.booked_prefill_tokens
    return worker.load.waiting_prefill_tokens + worker.unreported_prefill_tokens


def used_block_count(worker: WorkerView) -> int:
    """The report counts a block that several requests share once; bookings count it for each."""
    if worker.load is None:
        return worker.booked_block_count
    return worker.load.used_block_count + worker.unreported_block_count


def load_and_room_tokens(worker: WorkerView) -> tuple[float, int]:
    """What the worker has to do besides any new request; what its pool could still take, negative where more is booked than there is."""
    used, facts = used_block_count(worker), worker.facts
    load = queued_prefill_tokens(worker) + DECODE_WEIGHT * facts.block_size * used
    return load, facts.block_size * (facts.block_count - used)
