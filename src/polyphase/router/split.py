"""Whether prefill and decode of a request run on different workers: by a rule, and where enough was measured, by what it is worth.

    whole on W    the prompt waits for W's queue, is computed there, and holds up each sequence that decodes there for as long
    split P → D   the prompt waits for P's queue and is computed there; then its blocks travel, and the second token waits for that

        whole   (queued at W + uncached at W) · pace of W  +  running at W · uncached at W · pace of W
        split   (queued at P + uncached at P) · pace of P  +  tokens to move · pace of the transfer P → D  +  what a hand-over takes

A millisecond counts the same, whoever waits for it. Short prompts and those that are mostly cached are never split: the figures would
be smaller than their error.
"""

from __future__ import annotations

from dataclasses import dataclass

from polyphase.router.cost import in_flight_count, queued_prefill_tokens
from polyphase.router.pace import Paces
from polyphase.router.types import Placement, Pull, RouteRequest, SplitRule, WorkerView


@dataclass(frozen=True, slots=True)
class Side:
    """A worker that might compute the prompt, and how much of that it would have to compute, tokens.

    `pulling_ms`: what it waits for first, because some of the prompt comes from another worker's cache.
    """

    worker: WorkerView
    uncached_tokens: int
    pulling_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Worth:
    """Both ways in milliseconds: what the request itself waits for, and how long it holds up others, summed over them."""

    whole_ms: float
    held_up_ms: float
    held_up_count: int
    split_ms: float
    moving_ms: float

    @property
    def does_pay(self) -> bool:
        return self.split_ms + self.moving_ms < self.whole_ms + self.held_up_ms


def why_not_split(
    rule: SplitRule, request: RouteRequest, best: Placement, to_compute: int, pull: Pull | None = None
) -> tuple[str, str] | None:
    """Why the `best` worker for the whole request does all of it, in short and in words; None if prefill may belong elsewhere."""
    prompt = request.prompt_token_count
    if to_compute < rule.min_uncached_tokens:
        return "short-prompt", f"whole: {to_compute} of {prompt} prompt tokens to compute, splitting begins at {rule.min_uncached_tokens}"
    if to_compute < rule.min_uncached_fraction * prompt:
        or_pulled = f" or pulled from {pull.holder}" if pull is not None else ""
        return "cached", f"whole: {prompt - to_compute} of {prompt} prompt tokens are cached on {best.worker_id}{or_pulled}"
    return None


def worth_of_split(whole: Side, prefill: Side, taker: WorkerView, tokens_to_move: int, paces: Paces) -> Worth | None:
    """None while the paces are not known. `tokens_to_move`: of the prompt, those that the decode worker does not hold."""
    whole_pace = paces.prefill_ms_per_token(whole.worker.facts.worker_id)
    prefill_pace = paces.prefill_ms_per_token(prefill.worker.facts.worker_id)
    transfer_pace = paces.transfer_ms_per_token(prefill.worker.facts.worker_id, taker.facts.worker_id)
    hand_over_ms = paces.hand_over_ms
    if whole_pace is None or prefill_pace is None or transfer_pace is None or hand_over_ms is None:
        return None
    own_ms = whole.uncached_tokens * whole_pace
    held_up_count = in_flight_count(whole.worker)
    return Worth(
        whole_ms=queued_prefill_tokens(whole.worker) * whole_pace + own_ms + whole.pulling_ms,
        held_up_ms=held_up_count * own_ms,
        held_up_count=held_up_count,
        split_ms=(queued_prefill_tokens(prefill.worker) + prefill.uncached_tokens) * prefill_pace + prefill.pulling_ms,
        moving_ms=tokens_to_move * transfer_pace + hand_over_ms,
    )


def reason_of(worth: Worth | None, whole: Side, prefill: Side, prompt_tokens: int) -> str:
    """A phrase for a person; with `worth`, the figures that decided."""
    to_compute = prefill.uncached_tokens
    if worth is None:
        return f"split: {to_compute} of {prompt_tokens} prompt tokens to compute away from decoding requests"
    whole_id, prefill_id = whole.worker.facts.worker_id, prefill.worker.facts.worker_id
    others = f", and hold up {worth.held_up_count} others there" if worth.held_up_count else ", and hold up nobody"
    alone = f"{whole_id} alone would take {worth.whole_ms:.0f} ms to the first token{others}"
    apart = f"{prefill_id} takes {worth.split_ms:.0f} ms, and {worth.moving_ms:.0f} ms to hand over"
    return f"split: {alone}; {apart}" if worth.does_pay else f"whole: {alone}; {apart.replace('takes', 'would take')}"
