"""What sampling remembers of one sequence between steps; no torch, so that the scheduler's tests need none."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence

import xxhash

from polyphase.wire.requests import SamplingParams

_GREEDY_BELOW = 1e-5  # a temperature this small would only overflow; Source: vLLM's sampler draws the line here, too


class SamplingState:
    """Parameters, and the token counts that penalties need. Counts are kept only if a penalty is on."""

    __slots__ = ("has_penalties", "is_greedy", "is_plain", "output_counts", "params", "seen_ids")

    def __init__(self, params: SamplingParams, token_ids: Sequence[int], prompt_token_count: int) -> None:
        """`token_ids` are prompt and what was emitted elsewhere."""
        self.params = params
        self.is_greedy = params.temperature < _GREEDY_BELOW
        self.has_penalties = params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1
        self.is_plain = self.is_greedy and not self.has_penalties and not params.logit_bias and params.top_logprobs is None
        self.output_counts: Counter[int] = Counter()
        self.seen_ids: set[int] = set()
        if self.has_penalties:
            self.output_counts.update(token_ids[prompt_token_count:])
            self.seen_ids.update(token_ids)

    def note(self, token_id: int) -> None:
        """A token was added to the output."""
        if self.has_penalties:
            self.output_counts[token_id] += 1
            self.seen_ids.add(token_id)


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of one output position: a hash of seed and position, so that neither the batch nor the worker matters."""
    digest = xxhash.xxh3_64_intdigest(struct.pack("<QQ", seed & (2**64 - 1), position))
    return (digest >> 11) * 2.0**-53
