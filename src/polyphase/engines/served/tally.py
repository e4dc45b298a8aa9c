"""What a served engine reports as its load: its own requests, counted here, and what the server measures of itself.

waiting   accepted and without a token: those that the server says wait, and those that it has not been asked about yet
running   the rest; more if others than we use the server too
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from polyphase.engines.served.dialect import Gauges, Usage
from polyphase.engines.served.flight import Flight
from polyphase.wire.events import Load
from polyphase.wire.kv import EngineOffer
from polyphase.wire.requests import SequenceOutput


@dataclass(slots=True)
class Tally:
    block_count: int
    step: int = 0
    gauges: Gauges = field(default_factory=Gauges)
    accepted_since_gauges: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    transferred_tokens: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0
    finished: int = 0
    _has_moved: bool = False  # since the server was measured last

    def note_accepted(self) -> None:
        self.accepted_since_gauges += 1

    def note_step(self) -> None:
        self.step += 1
        self._has_moved = True

    def note_tokens(self, flight: Flight, count: int) -> None:
        """Tokens that the flight has counted already. The first says that the prompt is computed."""
        self.generated_tokens += count
        self.computed_tokens += count
        if count and flight.token_count == count:
            self.computed_tokens += len(flight.request.token_ids)

    def note_prefill(self, flight: Flight) -> None:
        """A prompt is computed for another server, and no token of it is ours to tell."""
        self.computed_tokens += len(flight.request.token_ids)

    def note_transfer(self, token_count: int) -> None:
        """Of a prompt that was computed elsewhere."""
        self.transferred_tokens += token_count
        self.computed_tokens -= token_count - 1  # the last one is computed in any case

    def note_end(self, flight: Flight) -> None:
        self.finished += 1
        if flight.has_computed:
            self.prompt_tokens += len(flight.request.token_ids)
        if not isinstance(flight.request.offer, EngineOffer):
            self.note_usage(flight.usage)

    def note_usage(self, usage: Usage | None) -> None:
        """What the server says at the end of a prompt; of one that was offered before, when the flight has ended."""
        if usage is not None:
            self.cached_tokens += usage.cached_tokens or 0

    def note_passed(self, output: SequenceOutput) -> None:
        """An answer that was passed through, as far as it tells what it took."""
        if output.passed is not None and output.passed.usage is not None:
            usage = output.passed.usage
            self.finished += 1
            self.prompt_tokens += usage.prompt_tokens
            self.cached_tokens += usage.cached_tokens
            self.generated_tokens += usage.completion_tokens

    def note_gauges(self, gauges: Gauges) -> None:
        """Steps that brought us no token are progress as well: of a long prompt, or of somebody else's requests."""
        if gauges.iterations > self.gauges.iterations and not self._has_moved:
            self.step += 1
        self._has_moved = False
        self.gauges = gauges
        self.accepted_since_gauges = 0

    def load(self, flights: Iterable[Flight], leased_block_count: int = 0, offered_token_count: int = 0) -> Load:
        """`offered_token_count`: of prompts that are offered already and still computed."""
        live = list(flights)
        unanswered = [flight for flight in live if not flight.token_count]
        own_waiting = min(len(unanswered), self.gauges.waiting_count + self.accepted_since_gauges)
        used = round(self.gauges.used_share * self.block_count)
        return Load(
            step=self.step,
            running_count=max(len(live) - own_waiting, self.gauges.running_count),
            waiting_count=max(own_waiting, self.gauges.waiting_count),
            waiting_prefill_tokens=sum(len(flight.request.token_ids) for flight in unanswered) + offered_token_count,
            block_count=self.block_count,
            used_block_count=min(used, self.block_count),
            leased_block_count=leased_block_count,
            prompt_tokens_total=self.prompt_tokens,
            cached_prompt_tokens_total=self.cached_tokens,
            transferred_tokens_total=self.transferred_tokens,
            generated_tokens_total=self.generated_tokens,
            finished_total=self.finished,
            preemptions_total=self.gauges.preemptions,
            computed_tokens_total=self.computed_tokens,
        )
