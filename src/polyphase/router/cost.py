"""What the workers' figures mean, and the one currency in which all reasons for and against a worker are weighed: tokens of prefill.

    cost = sum over the policy's scorers of  weight x figure        in tokens that would take as long to compute
    score = (lowest cost + 1) / (cost + 1)                          1 for the cheapest, one half for twice as much

A shared system prompt therefore draws requests to the worker that holds it until the queue and the sequences there outweigh it; then
the next request goes elsewhere, computes it there, and from then on there are two such workers.
"""

from __future__ import annotations

from polyphase.router.types import PREFILL, Leg, RouteRequest, WorkerView

# Many clients leave max_tokens at the model's maximum, so it says little about the length of the answer; this much of it is booked.
ASSUMED_OUTPUT_TOKENS = 128


def tokens_needed(request: RouteRequest, leg: Leg) -> int:
    """Tokens whose KV the request will fill there, as far as one can say."""
    if leg is PREFILL:
        return request.prompt_token_count
    output = request.max_output_tokens
    return request.prompt_token_count + (output if output < ASSUMED_OUTPUT_TOKENS else ASSUMED_OUTPUT_TOKENS)


def block_count_needed(request: RouteRequest, block_size: int, leg: Leg) -> int:
    return -(-tokens_needed(request, leg) // block_size)


def usable_block_count(token_count: int, block_size: int) -> int:
    """Full blocks of a prompt that a cache can spare it: the last token is always computed, because its output is wanted."""
    return max(token_count - 1, 0) // block_size


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


def in_flight_count(worker: WorkerView) -> int:
    """Requests that run or wait there, those of other frontends included."""
    if worker.load is None:
        return worker.booked_request_count
    return worker.load.running_count + worker.load.waiting_count + worker.unreported_request_count
