"""The mock engine without time of its own: whoever drives it says when a step is over. For event loops and for simulations.

begin_step    ─► StartedStep(duration_ns) ─ … that much later … ─► finish_step    ─► StepReport
begin_stretch ─► Stretch(ends_ns)         ─ … at the last end … ─► finish_stretch ─► StepReport

A stretch is several steps of which only the last can bring anything but a token for each sequence (`batching.coasting`): whoever reads
no tokens, as a simulation, need not look at each. If something comes in between, `cut` ends it with the step that is under way.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

from polyphase.core.clock import Clock
from polyphase.core.hashing import namespace_of, root_seed
from polyphase.engines.batching.core import EngineCore
from polyphase.engines.batching.outcome import PullResult, SampledToken, StepOutcome
from polyphase.engines.batching.scheduler import Row, SchedulerLimits, StepPlan
from polyphase.engines.batching.sequence import Sequence
from polyphase.engines.batching.storage import pull_blocks
from polyphase.engines.interface import StepReport
from polyphase.engines.mock.storage import MockStorage
from polyphase.engines.mock.timing import MockTimes
from polyphase.engines.mock.tokens import MockTokens, prompt_key
from polyphase.text import Tokenizer
from polyphase.wire.cards import ModelCard
from polyphase.wire.requests import TokenLogprob


@dataclass(frozen=True, slots=True)
class MockParts:
    """What `assembly` puts together. Owner: whoever holds the machine closes `storage`."""

    card: ModelCard
    storage: MockStorage
    tokenizer: Tokenizer
    tokens: MockTokens
    times: MockTimes
    limits: SchedulerLimits
    lease_ns: int


@dataclass(frozen=True, slots=True)
class StartedStep:
    plan: StepPlan
    duration_ns: int


@dataclass(slots=True)
class Stretch:
    """Steps of one plan, one right after the other; often only one."""

    plan: StepPlan
    begun_ns: int
    ends_ns: list[int]
    known_count: int = 0  # steps of which the core knows that they are done


Sample = Callable[[Sequence], SampledToken]
_UNREAD = SampledToken(0)


def say_nothing(sequence: Sequence) -> SampledToken:
    """For whoever reads no tokens."""
    return _UNREAD


def _no_block(lora: str | None) -> int:
    """In place of the last block's hash, which covers the adapter."""
    return 0 if lora is None else root_seed(namespace_of(None, lora))


class MockMachine:
    """Requests go to `core.submit` and `core.abort`. `sample` says what the sequences say; None: words that follow from the prompt."""

    def __init__(self, parts: MockParts, clock: Clock, sample: Sample | None = None) -> None:
        self.card = parts.card
        self.storage = parts.storage
        self._tokens = parts.tokens
        self._sample = sample or self._speak
        self._times = parts.times
        self._kv_bytes_ratio = parts.card.block_bytes // parts.storage.layout.block_bytes
        self.core = EngineCore(
            card=parts.card,
            storage=parts.storage,
            tokenizer=parts.tokenizer,
            limits=parts.limits,
            lease_ns=parts.lease_ns,
            clock=clock,
        )

    def begin_step(self) -> StartedStep | None:
        """None: there is nothing to compute; `core.take_idle_report` may have something to say."""
        plan = self._plan()
        return None if plan.is_empty else StartedStep(plan, self.duration_ns(plan))

    def _plan(self) -> StepPlan:
        plan = self.core.begin_step()
        while plan.is_empty and plan.preempted:
            plan = self.core.begin_step()
        return plan

    def finish_step(self, step: StartedStep) -> StepReport:
        return self.core.finish_step(self.execute(step.plan), step.plan)

    def begin_stretch(self, now_ns: int, longest: int) -> Stretch | None:
        """As `begin_step`, of `longest` steps at most; for requests that were submitted as imagined ones."""
        plan = self._plan()
        if plan.is_empty:
            return None
        if longest == 1:
            return Stretch(plan, now_ns, [now_ns + self.duration_ns(plan)])
        count = self.core.let_coast(plan, longest)
        decode_tokens = self.core.coasting_token_count
        if plan.rows:
            return Stretch(plan, now_ns, [now_ns + self._times.step_ns(plan.rows, plan.coasting_count, decode_tokens)])
        durations_ns = self._times.decode_steps_ns(plan.coasting_count, decode_tokens, count)
        durations_ns[0] += now_ns
        return Stretch(plan, now_ns, list(accumulate(durations_ns)))

    def catch_up(self, stretch: Stretch, now_ns: int) -> None:
        """Let the core know of the steps that ended before now, but for the last: that one is for `finish_stretch`."""
        done_count = min(bisect_left(stretch.ends_ns, now_ns), len(stretch.ends_ns) - 1)
        if done_count > stretch.known_count:
            self.core.count_steps(done_count - stretch.known_count)
            stretch.known_count = done_count

    def cut(self, stretch: Stretch, now_ns: int) -> None:
        """End the stretch with the step that is under way now. To be called before anything is submitted or aborted."""
        self.catch_up(stretch, now_ns)
        del stretch.ends_ns[stretch.known_count + 1 :]

    def finish_stretch(self, stretch: Stretch) -> StepReport:
        """Its outputs tell of sequences to which more happened than a further token."""
        self.catch_up(stretch, stretch.ends_ns[-1])
        rows = self.core.wake_due() + stretch.plan.rows
        self.core.finish_coasting()
        return self.core.finish_step(self._execute(stretch.plan, rows), stretch.plan)

    def duration_ns(self, plan: StepPlan) -> int:
        """Pulls come first, then the rows are computed."""
        pulling_ns = sum(self._times.pull_ns(pull, self.card.block_size) for pull in plan.pulls)
        return pulling_ns + self._times.step_ns(plan.rows)

    def execute(self, plan: StepPlan) -> StepOutcome:
        """What the step brings; takes no time worth mentioning. Does not raise."""
        try:
            return self._execute(plan, plan.rows)
        except Exception as error:  # noqa: BLE001  the root of the engine's work: it ends the requests of this step only
            return StepOutcome(error=error)

    def _execute(self, plan: StepPlan, wanted: list[Row]) -> StepOutcome:
        pulls = [self._pull(plan, place) for place in range(len(plan.pulls))]
        failed = {result.pull.sequence for result in pulls if result.error is not None}
        rows = [row for row in wanted if row.sequence not in failed] if failed else wanted
        return StepOutcome(pulls, rows, {row.sequence: self._sample(row.sequence) for row in rows if row.is_sampled})

    def _pull(self, plan: StepPlan, place: int) -> PullResult:
        """Reported as what it stands for: so many bytes in so much time."""
        pull = plan.pulls[place]
        result = pull_blocks(pull, self.storage)
        duration_ms = self._times.pull_ns(pull, self.card.block_size) / 1e6
        return replace(result, byte_count=result.byte_count * self._kv_bytes_ratio, duration_ms=duration_ms)

    def _prompt_key(self, sequence: Sequence) -> int:
        if sequence.prompt_key is None:
            block_size, prompt_count = self.card.block_size, sequence.request.prompt_token_count
            full_count = prompt_count // block_size
            last_hash = sequence.blocks.chain.hashes[full_count - 1] if full_count else _no_block(sequence.request.lora)
            sequence.prompt_key = prompt_key(last_hash, sequence.token_ids[full_count * block_size : prompt_count])
        return sequence.prompt_key

    def _speak(self, sequence: Sequence) -> SampledToken:
        key = self._prompt_key(sequence)
        position, stop = sequence.output_count, sequence.request.stop
        may_end = not stop.ignore_eos and position >= stop.min_tokens
        token_id = self._tokens.token(key, position, may_end=may_end)
        if sequence.request.sampling.top_logprobs is None:
            return SampledToken(token_id)
        return SampledToken(token_id, TokenLogprob(token_id, 0.0, [(token_id, 0.0)]))
