"""Whether a worker that computes a prompt pulls the beginning of it from another worker's cache: by what both ways take.

    chosen    | held here | saved: held by the holder     | to compute in any case |
    holder    | held there                                |

        pull      a question and its answer  +  saved · pace of pulling, holder → chosen · pulls from that holder under way
        compute   saved · pace of the chosen worker's prefill

What was not measured yet is tried; where nothing came several times in a row, nothing is asked for a while. The queue at the chosen worker
counts on neither side: the request waits for it both ways. What a holder has to do for it is slight; that its memory or link is busy
shows in the pace, and in how many others are at it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from polyphase.core.ids import RequestId, WorkerId
from polyphase.router.groups import mates_of
from polyphase.router.pace import Paces
from polyphase.router.types import Pull, PullRule, WorkerFacts
from polyphase.wire.cards import BLOCKS

QUESTION_MS = 2.0  # 496 tokens, question included: 1.4 to 1.7 ms, on a busy two-core machine


def may_pull(chosen: WorkerFacts, holder: WorkerFacts) -> bool:
    """Whether blocks can go from one to the other at all. A draining holder is one as good as any, for as long as it lives."""
    is_another = holder.worker_id != chosen.worker_id and mates_of(holder) == mates_of(chosen)
    can_exchange_blocks = chosen.can_hand_over and holder.can_hand_over and holder.offer_kind == BLOCKS
    return is_another and can_exchange_blocks and not (holder.is_stalled or holder.is_asleep)


class PullsUnderWay:
    """By holder; of requests whose prompt is not computed yet. Unknown requests are ignored."""

    def __init__(self) -> None:
        self._holder_of: dict[RequestId, WorkerId] = {}
        self._counts: Counter[WorkerId] = Counter()

    def begin(self, request_id: RequestId, holder: WorkerId) -> None:
        self.end(request_id)
        self._holder_of[request_id] = holder
        self._counts[holder] += 1

    def end(self, request_id: RequestId) -> None:
        holder = self._holder_of.pop(request_id, None)
        if holder is not None:
            self._counts[holder] -= 1
            if not self._counts[holder]:
                del self._counts[holder]

    def count(self, holder: WorkerId) -> int:
        return self._counts[holder]

    def __len__(self) -> int:
        return len(self._holder_of)


def choose_pull(
    rule: PullRule,
    chosen: WorkerFacts,
    held_tokens: int,
    holders: Iterable[tuple[WorkerFacts, int]],
    paces: Paces,
    under_way: PullsUnderWay,
    now_ns: int,
) -> Pull | None:
    """The best holder, wanted or not; None if nobody holds enough more.

    Args:
        held_tokens: of the prompt, at the chosen worker.
        holders: workers from which it may pull, and the tokens that they hold.
    """
    best: Pull | None = None
    best_rank: tuple[float, int] | None = None
    compute_pace = paces.prefill_ms_per_token(chosen.worker_id)
    for holder, tokens in holders:
        saved = tokens - held_tokens
        if saved < rule.min_tokens or paces.is_pull_in_vain(holder.worker_id, chosen.worker_id, now_ns):
            continue
        pace = paces.pull_ms_per_token(holder.worker_id, chosen.worker_id, now_ns)
        others = under_way.count(holder.worker_id)
        pull_ms = None if pace is None else QUESTION_MS + saved * pace * (1 + others)
        compute_ms = None if compute_pace is None else saved * compute_pace
        rank = (saved * (compute_pace or 1.0) - (pull_ms or 0.0), -others)
        if best_rank is None or rank > best_rank:
            is_wanted = pull_ms is None or compute_ms is None or pull_ms < compute_ms
            best, best_rank = Pull(holder.worker_id, holder.epoch, tokens, saved, is_wanted, compute_ms, pull_ms), rank
    return best


def reason_of_pull(pull: Pull, chosen: WorkerId) -> str:
    """A phrase for a person."""
    what = f"{pull.holder} is said to hold {pull.saved_token_count} prompt tokens that {chosen} does not"
    if pull.compute_ms is None or pull.pull_ms is None:
        return f"{what}, and how long pulling them takes is not known yet"
    if pull.is_wanted:
        return f"{what}; pulling them should take {pull.pull_ms:.0f} ms, computing them {pull.compute_ms:.0f} ms"
    return f"{what}, but pulling them would take {pull.pull_ms:.0f} ms, computing them {pull.compute_ms:.0f} ms"
