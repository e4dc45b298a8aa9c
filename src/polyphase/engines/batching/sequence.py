"""One request on its way through the engine: its tokens, its blocks, how far it is computed. Shared by scheduler and engine; no torch."""

from __future__ import annotations

from collections.abc import MutableSequence
from dataclasses import dataclass

from polyphase.engines.batching.grammars import Preparation
from polyphase.engines.batching.sampling_state import SamplingState
from polyphase.engines.batching.stopping import StopRule
from polyphase.engines.interface import BlockSource
from polyphase.kv import SequenceBlocks
from polyphase.text import GrammarMatcher
from polyphase.wire.kv import KvOffer
from polyphase.wire.requests import PhaseStats, Submit


@dataclass(slots=True, eq=False)
class Sequence:
    """
        token_ids | prompt        | emitted elsewhere | generated here |
                  0       prompt_token_count     len(request.token_ids)
                  ├── computed_count: KV is in the blocks ──┤ ← then come the tokens of the next steps

    A sequence is *decoding* when all but its last token are computed.
    """

    request: Submit
    arrival: int  # counts submissions
    arrived_ns: int
    token_ids: MutableSequence[int]
    blocks: SequenceBlocks
    sampling: SamplingState
    stop: StopRule
    preparation: Preparation | None = None  # of its grammar; until that is there, it waits
    grammar: GrammarMatcher | None = None  # where its output is in it
    offer: KvOffer | None = None  # not yet released
    source: BlockSource | None = None
    computed_count: int = 0
    is_cancelled: bool = False
    is_leaving: bool = False  # to be handed over when the step under way is finished
    stats: PhaseStats | None = None  # until the first output has carried it away
    imported: PhaseStats | None = None  # what came from elsewhere before it was submitted, until it is admitted
    shown_count: int = 0  # leading blocks that the worker it will be handed over to has been told of
    first_step_ns: int | None = None
    prompt_key: int | None = None  # a number for the prompt, of whoever computes the steps and wants it more than once

    @property
    def rank(self) -> tuple[int, int]:
        """The least is served first and given up last."""
        return (self.request.priority, self.arrival)

    @property
    def uncomputed_count(self) -> int:
        return len(self.token_ids) - self.computed_count

    @property
    def output_count(self) -> int:
        """Output tokens so far, those emitted elsewhere included."""
        return len(self.token_ids) - self.request.prompt_token_count
