"""Whether one more request would only lie in a worker's own queue, where nobody can put it in another order or send it elsewhere.

    prompt tokens queued ahead    what the worker computes in two steps: enough that it never runs dry before the next answer reaches it
    requests                      as many as it runs at once, and a few to fill the places of those that end
    KV blocks                     all that there are, counting what waiting prompts will take

A worker that has nothing to do is never saturated, so whatever the figures say, something always gets on.
"""

from __future__ import annotations

from polyphase.router.types import WorkerView

PREFILL_STEPS = 2
SPARE_PLACES_PART = 8  # of the requests that run at once, one in so many may wait there


def is_saturated(worker: WorkerView) -> bool:
    facts, load = worker.facts, worker.load
    requests, queued, blocks = worker.booked_request_count, worker.booked_prefill_tokens, worker.booked_block_count
    if load is not None:
        waiting_tokens = load.waiting_prefill_tokens
        requests = max(requests, load.running_count + load.waiting_count)
        queued = waiting_tokens + worker.unreported_prefill_tokens
        blocks = load.used_block_count + worker.unreported_block_count + waiting_tokens // facts.block_size
    if not requests:
        return False
    return (
        queued >= PREFILL_STEPS * facts.max_batch_tokens
        or requests >= facts.max_running + max(facts.max_running // SPARE_PLACES_PART, 1)
        or blocks >= facts.block_count
    )
