"""The engine's bookkeeping around a step: requests in, plans out, results turned into reports. Synchronous; one thread at a time.

    submit · abort · hand_over · release ─► begin_step ─► StepPlan ─► execute (elsewhere) ─► finish_step ─► StepReport

All but the last two may come between `begin_step` and `finish_step`, while the step runs: nothing that the step reads or writes changes
until it is finished. A sequence lives in `_sequences` from submission to its one terminal output.
"""

from __future__ import annotations

import logging
from collections.abc import MutableSequence
from dataclasses import dataclass

import msgspec

from polyphase.core.clock import Clock
from polyphase.core.errors import EngineFailed, InvalidRequest, PolyphaseError, RequestError
from polyphase.core.hashing import namespace_of
from polyphase.engines.batching.admission import check_lengths, check_request
from polyphase.engines.batching.exports import BlockExports, can_use
from polyphase.engines.batching.grammars import Grammars
from polyphase.engines.batching.imports import PrefixImports
from polyphase.engines.batching.outcome import PullResult, SampledToken, StepOutcome
from polyphase.engines.batching.pace import StepPace
from polyphase.engines.batching.sampling_state import SamplingState
from polyphase.engines.batching.scheduler import Row, Scheduler, SchedulerLimits, StepPlan
from polyphase.engines.batching.sequence import Sequence
from polyphase.engines.batching.stopping import Stop, StopLimits, StopRule
from polyphase.engines.batching.storage import BlockStorage
from polyphase.engines.interface import BlockSource, StepReport
from polyphase.kv import BlockNames, BlockPool, PrefixCache, SequenceBlocks
from polyphase.text import Tokenizer
from polyphase.wire.cards import ModelCard
from polyphase.wire.events import KvEvent, Load
from polyphase.wire.kv import KvOffer, Offer
from polyphase.wire.requests import FinishReason, PhaseStats, SequenceOutput, Submit, WireFailure

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Totals:
    """Counters of the load report."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    transferred_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    preemptions: int = 0
    computed_tokens: int = 0


class EngineCore:
    """Everything that an engine knows, except the model."""

    def __init__(
        self,
        *,
        card: ModelCard,
        storage: BlockStorage,
        tokenizer: Tokenizer,
        limits: SchedulerLimits,
        lease_ns: int,
        clock: Clock,
        grammars: Grammars | None = None,
    ) -> None:
        """`grammars`: needed if the card says that it takes some."""
        self._card = card
        self._storage = storage
        self._clock = clock
        self._grammars = grammars
        self._stop_limits = StopLimits(frozenset(card.eos_token_ids), card.context_length, tokenizer)
        self.pool = BlockPool(storage.block_count)
        self._cache = PrefixCache(self.pool, card.block_size, storage.layout.fingerprint + storage.layout.dtype)
        self._scheduler = Scheduler(limits, self._cache)
        self._pace = _pace_of(limits)
        self.exports = BlockExports(self.pool, storage.shared, lease_ns)
        self.imports = PrefixImports(self._cache, self.exports, lambda: self._scheduler.running_count)
        self._sequences: dict[str, Sequence] = {}
        self._cancelled: list[Sequence] = []  # during the current step
        self._leaving: list[Sequence] = []  # likewise
        self._totals = _Totals()
        self._arrivals = 0
        self._ended: list[SequenceOutput] = []  # outputs that did not come from a step
        self._released_offers: list[Offer] = []
        self._untaken_events: list[KvEvent] = []
        self._current: StepPlan | None = None  # while it is performed
        self._step_began_ns = 0

    # What the worker calls.

    def submit(self, request: Submit, source: BlockSource | None) -> None:
        check_request(request, self._card)
        self._refuse_if_unfit(request)
        salt = namespace_of(request.cache_salt, request.lora)
        imported = self.imports.claim(request.request_id, request.token_ids, salt)
        if imported is None:
            self._add(self._new_sequence(request, list(request.token_ids), self._cache.open(request.token_ids, salt), source))
            return
        imported.blocks.chain.extend(request.token_ids)
        sequence = self._new_sequence(request, list(request.token_ids), imported.blocks, source)
        sequence.imported = PhaseStats(
            transferred_token_count=imported.pulled_count * self._card.block_size,
            transferred_bytes=imported.pulled_count * self._card.block_bytes,
            transfer_ms=imported.waited_ms,
        )
        self._add(sequence)

    def submit_imagined(self, request: Submit, names: BlockNames) -> None:
        """As `submit`, for a simulation: of the tokens only their number counts, and their blocks, the answer's included, are named so.

        The request asks for nothing that depends on a token, `token_ids` need only have the right length, and whoever computes its steps
        samples zeros (`mock.machine.say_nothing`).
        """
        check_lengths(request, self._card)
        self._refuse_if_unfit(request)
        self._add(self._new_sequence(request, bytearray(len(request.token_ids)), SequenceBlocks(names), None))

    def _refuse_if_unfit(self, request: Submit) -> None:
        if request.request_id in self._sequences:
            raise InvalidRequest("a request of this id is running already", param="request_id", request_id=request.request_id)
        self._scheduler.refuse_if_full(request.request_id)

    def _add(self, sequence: Sequence) -> None:
        request = sequence.request
        if request.grammar is not None and self._grammars is not None:
            sequence.preparation = self._grammars.prepare(request)
        self._scheduler.add(sequence)
        self._sequences[request.request_id] = sequence
        self._totals.prompt_tokens += request.prompt_token_count
        stop = sequence.stop.at_length(len(sequence.token_ids))
        if stop is not None:  # it came from elsewhere, where all but the end was done
            self._ended.append(self._end(sequence, stop.reason))

    def abort(self, request_id: str) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            self.exports.release_request(request_id)
        elif self._current is not None:
            if not sequence.is_cancelled:
                self._cancelled.append(sequence)
            sequence.is_cancelled = True
            self._current.interrupt_if_pointless()
        else:
            self._ended.append(self._end(sequence, FinishReason.CANCELLED))

    def hand_over(self, request_id: str) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        if self._current is not None:
            if not sequence.is_leaving:
                self._leaving.append(sequence)
            sequence.is_leaving = True
        elif not _leaves_by_itself(sequence):
            self._ended.append(self._hand_over(sequence))

    @property
    def has_requests(self) -> bool:
        return bool(self._sequences)

    def load(self) -> Load:
        totals, scheduler = self._totals, self._scheduler
        return Load(
            step=totals.steps,
            running_count=scheduler.running_count,
            waiting_count=scheduler.waiting_count,
            waiting_prefill_tokens=scheduler.uncomputed_prefill_tokens,
            block_count=self.pool.block_count,
            used_block_count=self.pool.used_count,
            cached_block_count=self.pool.idle_count,
            leased_block_count=self.exports.leases.block_count,
            prompt_tokens_total=totals.prompt_tokens,
            cached_prompt_tokens_total=totals.cached_tokens,
            transferred_tokens_total=totals.transferred_tokens,
            generated_tokens_total=totals.generated_tokens,
            finished_total=totals.finished,
            preemptions_total=totals.preemptions,
            computed_tokens_total=totals.computed_tokens,
        )

    # A step.

    def begin_step(self) -> StepPlan:
        """Plan the next step; it has to be finished unless it is empty."""
        now_ns = self._clock.now_ns()
        if expired := self.exports.expire(now_ns):
            logger.warning("%d offers ran out before their blocks were fetched", expired)
        for sequence in self._scheduler.waiting:
            if sequence.preparation is not None and sequence.preparation.done():
                self._take_grammar(sequence)
            if sequence.offer is not None and not can_use(sequence.offer, self._storage.layout, now_ns):
                logger.info("request %s: the offered blocks cannot be used and are computed here", sequence.request.request_id)
                self._give_up_offer(sequence)
        plan = self._scheduler.plan(None if self._pace is None else self._pace.limit_tokens)
        self._totals.preemptions += len(plan.preempted)
        pulled = {pull.sequence: pull.first_block for pull in plan.pulls}
        for sequence in plan.admitted:
            self._note_admission(sequence, now_ns)
            if sequence not in pulled:
                self._give_up_offer(sequence)
        if self.exports.has_offered:
            self.exports.before_writing(
                [
                    block_id
                    for row in plan.rows
                    for block_id in row.sequence.blocks.block_ids[
                        pulled.get(row.sequence, row.start // self._card.block_size) : self._cache.blocks_for(row.start + row.count)
                    ]
                ]
            )
        self._current = None if plan.is_empty else plan
        self._step_began_ns = now_ns
        return plan

    # Many steps at once, for whoever reads no tokens.

    def let_coast(self, plan: StepPlan, longest: int) -> int:
        """Count the plan's decoding sequences instead of planning them; returns for how many steps, at most `longest`, the plan holds.

        In these steps, if nothing comes in between, every coasting sequence gets a token, and nothing else happens before the last.
        """
        self._scheduler.let_coast(plan)
        can_change = plan.rows or plan.admitted or plan.preempted or self.exports.leases.block_count
        # What was evicted for this step, for example, is to be told at its end.
        has_news = self._ended or self._released_offers or self._untaken_events or self.pool.journal.has_pending
        if can_change or has_news or any(sequence.offer is not None for sequence in self._scheduler.waiting):
            return 1
        return min(longest, self._scheduler.coasting.steps_until_due or 1)

    @property
    def coasting_token_count(self) -> int:
        """Sum of the lengths of what coasts."""
        return self._scheduler.coasting.token_count

    def count_steps(self, step_count: int) -> None:
        """So many of the steps for which the plan holds are done, and not the last one of them."""
        self._totals.steps += step_count
        self._totals.generated_tokens += step_count * len(self._scheduler.coasting)
        self._totals.computed_tokens += step_count * len(self._scheduler.coasting)
        self._scheduler.coasting.count(step_count)

    def wake_due(self) -> list[Row]:
        """Rows to which something happens in the step that is to be finished next; `finish_coasting` comes before it is."""
        return self._scheduler.wake_due()

    def finish_coasting(self) -> None:
        """Count the step that is to be finished next for those that coast on."""
        self._totals.generated_tokens += len(self._scheduler.coasting)
        self._totals.computed_tokens += len(self._scheduler.coasting)
        self._scheduler.coasting.count(1)

    def finish_step(self, outcome: StepOutcome, plan: StepPlan) -> StepReport:
        self._current = None
        self._totals.steps += 1
        if outcome.error is not None:
            logger.error("an engine step failed; its %d requests end", len(plan.rows), exc_info=outcome.error)
            outputs = [self._fail(row.sequence, f"the engine failed in a step: {outcome.error}") for row in plan.rows]
        else:
            for result in outcome.pulls:
                self._finish_pull(result)
            if self._pace is not None and any(row.count > 1 for row in outcome.computed):
                self._pace.note(sum(row.count for row in outcome.computed), self._clock.now_ns() - self._step_began_ns)
            outputs = []
            block_size, samples = self._card.block_size, outcome.samples
            for row in outcome.computed:
                sequence = row.sequence
                sequence.computed_count = computed_count = row.start + row.count
                self._totals.computed_tokens += row.count
                if computed_count >= (sequence.blocks.named_count + 1) * block_size:
                    self._cache.commit(sequence.blocks, sequence.token_ids, computed_count)
                if sequence in samples:
                    if not sequence.is_cancelled:
                        outputs.append(self._advance(sequence, samples[sequence]))
                elif sequence.request.with_parts and sequence.blocks.named_count > sequence.shown_count:
                    outputs += self._show_blocks(sequence)
        cancelled, self._cancelled = self._cancelled, []
        for sequence in cancelled:
            if self._sequences.get(sequence.request.request_id) is sequence:  # it may have failed
                outputs.append(self._end(sequence, FinishReason.CANCELLED))
        leaving, self._leaving = self._leaving, []
        for sequence in leaving:
            if self._sequences.get(sequence.request.request_id) is sequence:
                sequence.is_leaving = False
                if not _leaves_by_itself(sequence):
                    outputs.append(self._hand_over(sequence))
        return self._report(outputs)

    def take_idle_report(self) -> StepReport | None:
        """What happened without a step: requests that ended while they waited, offers given up, blocks named or evicted."""
        report = self._report([])
        return report if report.outputs or report.events or report.released_offers else None

    def keep_for_later(self, report: StepReport) -> None:
        """Put back what nobody was there to take; it comes first in the next report."""
        self._ended = report.outputs + self._ended
        self._released_offers = report.released_offers + self._released_offers
        self._untaken_events = report.events

    def _report(self, outputs: list[SequenceOutput]) -> StepReport:
        events = self._untaken_events + self.pool.journal.take()
        report = StepReport(self._totals.steps, self._ended + outputs, events, self._released_offers)
        self._ended, self._released_offers, self._untaken_events = [], [], []
        return report

    # One sequence.

    def _new_sequence(
        self, request: Submit, token_ids: MutableSequence[int], blocks: SequenceBlocks, source: BlockSource | None
    ) -> Sequence:
        self._arrivals += 1
        offer = request.offer
        return Sequence(
            request=request,
            arrival=self._arrivals,
            arrived_ns=self._clock.now_ns(),
            token_ids=token_ids,
            blocks=blocks,
            sampling=SamplingState(request.sampling, token_ids, request.prompt_token_count),
            stop=StopRule(request, self._stop_limits),
            offer=offer if source is not None and isinstance(offer, KvOffer) else None,  # what nobody opened is not ours to release
            source=source,
        )

    def _take_grammar(self, sequence: Sequence) -> None:
        """Its grammar is prepared: it waits for its turn now, or ends."""
        assert sequence.preparation is not None
        preparation, sequence.preparation = sequence.preparation, None
        try:
            sequence.grammar = preparation.result()
        except RequestError as error:
            self._ended.append(self._fail(sequence, error.message, type(error)))
        except Exception as error:  # the root of the thread's work
            logger.exception("a grammar could not be prepared")
            self._ended.append(self._fail(sequence, f"the grammar could not be prepared: {error}"))
        else:
            if sequence.grammar.is_complete:  # it came from elsewhere, where all but the end was done; or nothing is all that fits
                self._ended.append(self._end(sequence, FinishReason.STOP))

    def _note_admission(self, sequence: Sequence, now_ns: int) -> None:
        """The first time only: after a preemption it would find its own blocks."""
        if sequence.first_step_ns is not None:
            return
        sequence.first_step_ns = now_ns
        imported, sequence.imported = sequence.imported or PhaseStats(), None
        imported_count = min(imported.transferred_token_count, sequence.computed_count)  # some may have been evicted meanwhile
        cached_count = max(0, min(sequence.computed_count, sequence.request.prompt_token_count) - imported_count)
        self._totals.cached_tokens += cached_count
        self._totals.transferred_tokens += imported_count
        sequence.stats = msgspec.structs.replace(
            imported,
            cached_token_count=cached_count,
            transferred_token_count=imported_count,
            queue_ms=(now_ns - sequence.arrived_ns) / 1e6,
        )

    def _finish_pull(self, result: PullResult) -> None:
        sequence = result.pull.sequence
        if result.error is not None:
            logger.warning("request %s: offered blocks are computed here: %s", sequence.request.request_id, result.error)
        count = result.token_count - sequence.computed_count
        if count > 0:
            sequence.computed_count = result.token_count
            self._totals.transferred_tokens += count
            before = sequence.stats or PhaseStats()
            sequence.stats = msgspec.structs.replace(
                before,
                transferred_token_count=before.transferred_token_count + count,
                transferred_bytes=before.transferred_bytes + result.byte_count,
                transfer_ms=before.transfer_ms + result.duration_ms,
            )
        self._give_up_offer(sequence)

    def _give_up_offer(self, sequence: Sequence) -> None:
        """The offer is used, or of no use: whoever made it may have its blocks back."""
        if sequence.offer is not None:
            self._released_offers.append(sequence.offer)
        sequence.offer = sequence.source = None

    def _advance(self, sequence: Sequence, sampled: SampledToken | None) -> SequenceOutput:
        """Append the sampled token; end the sequence if it is time."""
        grammar = sequence.grammar
        if grammar is not None and (failure := grammar.failure) is not None:
            return self._fail(sequence, f"the output cannot go on in its grammar: {failure}", InvalidRequest)
        if sampled is None:
            spoilt = self.pool.disown(sequence.blocks.ids())  # such numbers must not reach whoever gets the blocks next
            self.exports.before_writing(spoilt)
            self._storage.zero(spoilt)
            return self._fail(sequence, "the model's output is not a number for this request")
        sequence.token_ids.append(sampled.token_id)
        sequence.sampling.note(sampled.token_id)
        self._totals.generated_tokens += 1
        stop = sequence.stop.after(sampled.token_id, len(sequence.token_ids), sequence.output_count)
        if grammar is not None:
            grammar.accept([sampled.token_id])
            if grammar.is_complete and (stop is None or stop.reason is FinishReason.LENGTH):
                stop = Stop(FinishReason.STOP)
        stats, sequence.stats = sequence.stats, None
        offer = None
        if stop is None and (sequence.is_leaving or (sequence.request.hand_over and self.exports.can_offer)):
            stop = Stop(FinishReason.HANDED_OVER)
            offer = self._offer_blocks(sequence)
        if stop is not None:
            self._remove(sequence)
        return SequenceOutput(
            request_id=sequence.request.request_id,
            token_ids=[sampled.token_id],
            logprobs=None if sampled.logprob is None else [sampled.logprob],
            finish_reason=None if stop is None else stop.reason,
            stop_reason=None if stop is None else stop.matched,
            offer=offer,
            stats=stats,
        )

    def _hand_over(self, sequence: Sequence) -> SequenceOutput:
        """It gets no token here any more. An offer that it brought along and that nobody has read goes on with it."""
        offer, sequence.offer = sequence.offer, None
        if offer is None and sequence.computed_count:
            offer = self._offer_blocks(sequence)
        self._remove(sequence)
        return SequenceOutput(request_id=sequence.request.request_id, finish_reason=FinishReason.HANDED_OVER, offer=offer)

    def _show_blocks(self, sequence: Sequence) -> list[SequenceOutput]:
        """To whoever will take the request over: what is computed of its prompt will not change any more."""
        if not self.exports.can_offer or sequence.is_cancelled:
            return []
        first, sequence.shown_count = sequence.shown_count, sequence.blocks.named_count
        part = self.exports.show(first, sequence.blocks.block_ids[first : sequence.shown_count])
        return [SequenceOutput(request_id=sequence.request.request_id, part=part)]

    def _offer_blocks(self, sequence: Sequence) -> KvOffer | None:
        """None if no other process can read them; they are released with the sequence then."""
        if not self.exports.can_offer:
            return None
        block_ids = self._cache.detach(sequence.blocks)
        kept_count = self._cache.blocks_for(sequence.computed_count)
        self.pool.release(block_ids[kept_count:])
        return self.exports.offer(sequence.request.request_id, block_ids[:kept_count], sequence.computed_count, self._clock.now_ns())

    def _end(self, sequence: Sequence, reason: FinishReason) -> SequenceOutput:
        self._remove(sequence)
        return SequenceOutput(request_id=sequence.request.request_id, finish_reason=reason)

    def _fail(self, sequence: Sequence, message: str, kind: type[PolyphaseError] = EngineFailed) -> SequenceOutput:
        self._remove(sequence)
        failure = WireFailure(code=kind.code, message=message, is_retryable=kind.is_retryable)
        return SequenceOutput(request_id=sequence.request.request_id, finish_reason=FinishReason.ERROR, failure=failure)

    def _remove(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        if sequence.preparation is not None:
            sequence.preparation.cancel()
        self._give_up_offer(sequence)
        del self._sequences[sequence.request.request_id]
        self._totals.finished += 1


def _leaves_by_itself(sequence: Sequence) -> bool:
    """Its prompt is being computed for another worker already: what is done of it is best finished."""
    return sequence.request.hand_over and sequence.computed_count > 0


def _pace_of(limits: SchedulerLimits) -> StepPace | None:
    if limits.longest_step_ms is None:
        return None
    most_tokens = max(limits.max_batch_tokens, limits.max_prefill_batch_tokens or 0)
    return StepPace(int(limits.longest_step_ms * 1e6), most_tokens)
