"""What happened to one sequence, kept for people who ask why: each attempt with the route's candidates, and the moments in between.

    attempt 1   route ─ sent ─ refused (why)
    attempt 2   route ─ sent ─ first token ─ broken off (why)
    attempt 3   route ─ sent ─ … ─ end

Written by the dispatcher as things happen, read by `/debug/requests/{id}` and, from there, by `polyphase explain`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from polyphase.router import Candidate, Leg, Placement, Route, reason_of_pull
from polyphase.wire.requests import PhaseStats

MAX_CANDIDATES = 16
MAX_ATTEMPTS, MAX_MOMENTS = 16, 64  # a sequence that is refused again and again must not fill the memory


@dataclass(frozen=True, slots=True)
class Moment:
    """`event` is one of a few words, `detail` a phrase for a person."""

    at_ns: int
    # accepted | queued | admitted | refused | sent | first token | first answer | handed over | transferred | moved | broken off | ended
    event: str
    worker: str | None = None
    detail: str | None = None

    def as_json(self, started_ns: int) -> dict[str, Any]:
        at_ms = round((self.at_ns - started_ns) / 1e6, 3)
        return {"at_ms": at_ms, "event": self.event, "worker": self.worker, "detail": self.detail}


@dataclass(frozen=True, slots=True)
class Setback:
    """Why an attempt came to nothing or was not finished, at this worker. `cause` is a phrase for a person."""

    event: str  # refused | moved | broken off
    worker: str
    cause: str


@dataclass(slots=True)
class Attempt:
    """One route, and what came of it. `is_split`: the prefill leg is used; it is not where handed-over blocks wait already."""

    route: Route
    at_ns: int
    token_count: int  # of prompt and output, as of the route
    is_split: bool
    setback: Setback | None = None
    prefill_stats: PhaseStats | None = None
    decode_stats: PhaseStats | None = None

    def note_stats(self, stats: PhaseStats, *, of_prefill_leg: bool) -> None:
        if of_prefill_leg:
            self.prefill_stats = stats
        else:
            self.decode_stats = stats

    @property
    def has_report(self) -> bool:
        """Whether an engine has told of it."""
        return self.prefill_stats is not None or self.decode_stats is not None

    @property
    def prompt_leg(self) -> Placement:
        """Where the prompt is computed."""
        return self.route.prefill if self.is_split and self.route.prefill else self.route.decode

    def predicted_cached_tokens(self, placement: Placement) -> int:
        return placement.overlap_block_count * placement.block_size

    def as_json(self, started_ns: int) -> dict[str, Any]:
        return {
            "at_ms": round((self.at_ns - started_ns) / 1e6, 3),
            "reason": self.route.reason,
            "rule": self.route.rule,
            "split": self.is_split,
            "tokens": self.token_count,
            "block_size": self.prompt_leg.block_size,
            "pull": self._pull(),
            "setback": None if self.setback is None else asdict(self.setback),
            "legs": [self._leg(placement, stats) for placement, stats in self._legs()],
        }

    def _pull(self) -> dict[str, Any] | None:
        """None where nobody else held more of the prompt, or where a hand-over made it needless."""
        pull = self.route.pull
        if pull is None or self.is_split != (self.route.prefill is not None):
            return None
        return {
            "holder": pull.holder,
            "tokens": pull.saved_token_count,
            "is_wanted": pull.is_wanted,
            "reason": reason_of_pull(pull, self.prompt_leg.worker_id),
        }

    def _legs(self) -> Iterator[tuple[Placement, PhaseStats | None]]:
        if self.is_split and self.route.prefill is not None:
            yield self.route.prefill, self.prefill_stats
        yield self.route.decode, self.decode_stats

    def _leg(self, placement: Placement, stats: PhaseStats | None) -> dict[str, Any]:
        return {
            "leg": placement.leg.value,
            "worker": placement.worker_id,
            "predicted_cached_tokens": self.predicted_cached_tokens(placement),
            "reported_cached_tokens": stats.cached_token_count if stats else None,
            "transferred_tokens": stats.transferred_token_count if stats else None,
            "queue_ms": round(stats.queue_ms, 3) if stats else None,
            "transfer_ms": round(stats.transfer_ms, 3) if stats else None,
            "candidate_count": len(placement.candidates),
            "candidates": candidates_json(placement, self.token_count),
        }


@dataclass(slots=True)
class History:
    """Attempts and moments of one sequence."""

    attempts: list[Attempt] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)

    def add(self, attempt: Attempt) -> None:
        """The first attempt and the latest ones are kept."""
        if len(self.attempts) >= MAX_ATTEMPTS:
            del self.attempts[1]
        self.attempts.append(attempt)

    def note(self, now_ns: int, event: str, worker: str | None = None, detail: str | None = None) -> None:
        """The first half and the latest moments are kept."""
        if len(self.moments) >= MAX_MOMENTS:
            del self.moments[MAX_MOMENTS // 2]
        self.moments.append(Moment(now_ns, event, worker, detail))


def candidates_json(placement: Placement, token_count: int) -> list[dict[str, Any]]:
    """The best candidates of one leg, with the figures behind their scores. Tokens, unless the name says otherwise."""
    return [
        {
            "leg": placement.leg.value,
            "worker": candidate.worker_id,
            "group": candidate.group,
            "is_chosen": candidate.worker_id == placement.worker_id,
            "score": round(candidate.score, 4),
            "costs": {name: round(cost, 1) for name, cost in candidate.costs},
            "overlap_blocks": candidate.overlap_block_count,
            **_tokens(candidate, placement.leg, token_count),
            "queued_tokens": candidate.queued_prefill_tokens,
            "used_blocks": candidate.used_block_count,
            "booked_prefill_tokens": candidate.booked_prefill_tokens,
            "booked_blocks": candidate.booked_block_count,
            "booked_requests": candidate.booked_request_count,
        }
        for candidate in placement.candidates[:MAX_CANDIDATES]
    ]


def _tokens(candidate: Candidate, leg: Leg, token_count: int) -> dict[str, int]:
    """Cached on the device, resting in lower tiers, and what remains to be computed or, on a decode leg, moved."""
    cached = candidate.overlap_block_count * candidate.block_size
    if leg is Leg.DECODE:
        return {"cached_tokens": cached, "tokens_to_move": token_count - cached}
    held = cached if candidate.held_block_count is None else candidate.held_block_count * candidate.block_size
    return {"cached_tokens": cached, "lower_tier_tokens": held - cached, "tokens_to_compute": token_count - held}
