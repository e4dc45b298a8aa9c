"""Which workers may take which leg of a request, each reason one `contracts.Filter`, in this order:

draining   leaves, and takes nothing new
asleep     gave its accelerator's memory free
stalled    is there and makes no progress
excluded   was tried for this request in vain
labels     does not carry a label that the request requires
passes     does not take the body of a request that is passed through
adapter    does not have the LoRA adapter that the request is for
grammars   has no structured output, or not for an output that has begun elsewhere, and the request wants it
role         role      whole request   decode leg   prefill leg
             both      yes             yes          no: it would decode there as well as anywhere
             decode    yes             yes          no
             prefill   only if alone   no           yes, if it can hand over to one that decodes
              (who does one half only never serves a whole request)
context    is too short for it: it joined when the request was under way already
full       runs and queues as many requests of this router as it may
mates      is of another group, engine, block size or kind of offers than the worker that has the other leg
reserve    weighs 0, and a worker that does not can take the request at once
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from polyphase.core.errors import NoWorkers, Overloaded, Refused
from polyphase.router.groups import mates_of
from polyphase.router.lineup import Lineup
from polyphase.router.types import Leg, RouteRequest, WorkerFacts
from polyphase.wire.cards import Role


class Draining:
    """leave, and take nothing new"""

    is_lasting = True

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        views = workers.standings.views
        return [row for row in rows if not views[row].facts.is_draining]

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        return NoWorkers(
            f"{every(worker_count)} of the model {request.model!r} is draining; retry when another has joined",
            retry_after_s=5,
            request_id=request.request_id,
        )


class Asleep:
    """are asleep"""

    is_lasting = True

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        views = workers.standings.views
        return [row for row in rows if not views[row].facts.is_asleep]

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        return NoWorkers(
            f"{every(worker_count)} of the model {request.model!r} is asleep; somebody has to wake one (polyphase wake)",
            retry_after_s=5,
            request_id=request.request_id,
        )


class Stalled:
    is_lasting = True

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        views = workers.standings.views
        return [row for row in rows if not views[row].facts.is_stalled]

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        return NoWorkers(
            f"{every(worker_count)} of the model {request.model!r} stands still; retry when one makes progress again",
            retry_after_s=5,
            request_id=request.request_id,
        )


class Excluded:
    """were tried for this request in vain"""

    is_lasting = True

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        if not request.excluded:
            return rows
        return [row for row in rows if workers.worker_ids[row] not in request.excluded]

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        return NoWorkers(
            f"{every(worker_count)} of the model {request.model!r} was tried for this request and failed", request_id=request.request_id
        )


class RequiredLabels:
    """do not carry a label that the request requires"""

    is_lasting = True

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        if not request.required_labels:
            return rows
        differing = workers.standings.differing_labels(request.required_labels)
        return [row for row in rows if not differing[row]]

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        wanted = ", ".join(f"{name}={value}" for name, value in sorted(request.required_labels.items()))
        return NoWorkers(
            f"{every(worker_count)} of the model {request.model!r} lacks a required label; wanted: {wanted}",
            retry_after_s=5,
            request_id=request.request_id,
        )


class Passes:
    """do not take what a request that is passed through holds"""

    is_lasting = True

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        if not request.needs:
            return rows
        views = workers.standings.views
        return [row for row in rows if request.needs <= views[row].facts.passes]

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        return NoWorkers(
            f"no worker of the model {request.model!r} that is there now passes on {', '.join(sorted(request.needs))}",
            retry_after_s=5,
            request_id=request.request_id,
        )


class HasAdapter:
    """do not have the LoRA adapter that the request is for"""

    is_lasting = True

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        if request.adapter is None:
            return rows
        views = workers.standings.views
        return [row for row in rows if request.adapter in views[row].facts.adapters]

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        return NoWorkers(
            f"{every(worker_count)} of the model {request.model!r} that could take it is without the LoRA adapter {request.adapter!r}; "
            "retry when one that has it has joined",
            retry_after_s=5,
            request_id=request.request_id,
        )


class TakesGrammars:
    """have no structured output, for requests that want it

    An output that has begun at another worker, as that of a split request will have, needs one that can take it up. Nobody computes a
    prompt for others if none of them can.
    """

    is_lasting = True

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        if not request.has_grammar:
            return rows
        views = workers.standings.views
        able = [row for row in rows if views[row].facts.takes_grammars]
        resuming = [row for row in able if views[row].facts.resumes_grammars]
        if request.is_begun or leg is Leg.DECODE:
            return resuming
        if leg is Leg.PREFILL and all(views[row].facts.role is Role.PREFILL for row in resuming):
            return []
        return able

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        what = "cannot go on with structured output that has begun elsewhere" if request.is_begun else "has no structured output"
        return NoWorkers(f"{every(worker_count)} of the model {request.model!r} {what}", retry_after_s=5, request_id=request.request_id)


class FitsRole:
    """are not for this leg

    Prefill workers serve whole requests when nobody else is there: better a mixed worker than a refused request.
    """

    is_lasting = True

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        views = workers.standings.views
        others = [row for row in rows if views[row].facts.role is not Role.PREFILL]
        if leg is Leg.BOTH:
            return [row for row in others if views[row].facts.serves_whole] or [row for row in rows if views[row].facts.serves_whole]
        if leg is Leg.DECODE:
            return others or [row for row in rows if views[row].facts.serves_whole]
        kinds = {views[row].facts.offer_kind for row in others}
        return [row for row in rows if _can_hand_over_to(kinds, views[row].facts)]

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        return NoWorkers(f"no worker of the model {request.model!r} has a fitting role", retry_after_s=5, request_id=request.request_id)


class FitsContext:
    """have too short a context"""

    is_lasting = False

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        least, needed = workers.standings.least_context, request.prompt_token_count + request.max_output_tokens
        if least is None or needed <= least or request.needs:  # the size of what is passed through is a guess; its engine knows
            return rows
        views = workers.standings.views
        return [row for row in rows if (length := views[row].facts.context_length) is None or needed <= length]

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        return NoWorkers(
            f"{every(worker_count)} of the model {request.model!r} that is left has too short a context for it",
            retry_after_s=5,
            request_id=request.request_id,
        )


class Full:
    """run and queue as many requests of this router as they may"""

    is_lasting = False

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        full = workers.standings.full_rows
        return [row for row in rows if row not in full] if full else rows

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        return Overloaded(
            f"{every(worker_count)} of the model {request.model!r} runs and queues as many requests as it may; retry later",
            retry_after_s=2,
            request_id=request.request_id,
        )


class Mates:
    """cannot exchange KV with the worker that has the other leg"""

    is_lasting = False

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        if workers.partner is None or len(workers.standings.mates) == 1:
            return rows
        views, wanted = workers.standings.views, mates_of(workers.partner)
        return [row for row in rows if mates_of(views[row].facts) == wanted]

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        return NoWorkers(
            f"{every(worker_count)} of the model {request.model!r} that has room is of another group, engine, block size or kind "
            "than the one that would compute the prompt",
            retry_after_s=2,
            request_id=request.request_id,
        )


class Reserve:
    """weigh 0, while others can take the request at once"""

    is_lasting = False

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        standings = workers.standings
        if not standings.has_reserve or workers.partner is not None:
            return rows
        weighty = [row for row in rows if standings.weights[standings.views[row].facts.group] > 0]
        return weighty if standings.has_headroom(weighty) else rows

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        return no_worker_serves(request)  # does not happen: it leaves somebody


def _can_hand_over_to(kinds: Collection[str], facts: WorkerFacts) -> bool:
    return facts.role is Role.PREFILL and facts.can_hand_over and facts.offer_kind in kinds


def no_worker_serves(request: RouteRequest) -> Refused:
    return NoWorkers(
        f"no worker serves the model {request.model!r} at the moment; retry when one has joined",
        retry_after_s=5,
        request_id=request.request_id,
    )


def every(count: int) -> str:
    return "the only worker" if count == 1 else f"each of the {count} workers"
