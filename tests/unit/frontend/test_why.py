"""What a frontend keeps and tells of each decision."""

from __future__ import annotations

from polyphase.core.ids import Epoch, RequestId, WorkerId
from polyphase.frontend.history import MAX_ATTEMPTS, MAX_MOMENTS, Attempt, History
from polyphase.frontend.records import SequenceRecord
from polyphase.router import Candidate, Leg, Placement, Route
from polyphase.wire.cards import Role
from polyphase.wire.requests import PhaseStats

from .stack import SPLIT_FROM, Stack, wait_for

WHOLE = Route(
    RequestId("r"),
    Placement(Leg.BOTH, WorkerId("w"), Epoch(1), 2, (Candidate(WorkerId("w"), 1.0, 2, 0, 0, 0), Candidate(WorkerId("v"), 0.5, 0, 0, 0, 0))),
    None,
    "whole: short",
    "short-prompt",
)


async def test_a_split_request_is_told_of_leg_by_leg(stack: Stack) -> None:
    for worker_id, role in (("p-0", Role.PREFILL), ("p-1", Role.PREFILL), ("d-0", Role.DECODE)):
        await stack.add(worker_id, role)
    prompt = list(range(3 * SPLIT_FROM))
    answer = await stack.post("/v1/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 4})
    headers = answer.headers
    assert headers["x-polyphase-route"] == "split"
    assert headers["x-polyphase-predicted-cached-tokens"] == headers["x-polyphase-cached-tokens"] == "0"
    await wait_for(lambda: stack.is_at_rest)
    page = await stack.record(headers["x-request-id"])
    (route,) = page["routes"]
    assert (route["split"], route["rule"], route["setback"], route["tokens"]) == (True, "split", None, len(prompt))
    prefill, decode = route["legs"]
    assert {row["worker"] for row in prefill["candidates"]} == {"p-0", "p-1"}
    assert [row["worker"] for row in prefill["candidates"] if row["is_chosen"]] == [page["prefill_worker"]]
    assert all(row["tokens_to_compute"] == len(prompt) and row["queued_tokens"] == 0 for row in prefill["candidates"])
    assert decode["candidates"][0]["tokens_to_move"] == len(prompt)
    assert decode["transferred_tokens"] == len(prompt)
    assert [moment["event"] for moment in page["timeline"]] == ["accepted", "sent", "first token", "handed over", "transferred", "ended"]
    times = [moment["at_ms"] for moment in page["timeline"]]
    assert times == sorted(times)
    assert times[0] == 0
    listed = (await stack.get("/debug/requests?limit=1")).json()["data"]
    assert [record["id"] for record in listed] == [page["id"]]


async def test_a_migration_keeps_both_routes_and_the_cause(stack: Stack) -> None:
    (await stack.add("a")).behaviour.fails_after = 2
    (await stack.add("b")).behaviour.fails_after = 2
    answer = await stack.post("/v1/completions", {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 2, "n": 2})
    await wait_for(lambda: stack.is_at_rest)
    page = await stack.record(answer.headers["x-request-id"])
    assert len(page["other_choices"]) == 1
    first = next(iter(stack.workers.values()))
    first.behaviour.fails_after = None
    answer = await stack.post("/v1/completions", {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 5})
    answer = await stack.post("/v1/completions", {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 5})
    await wait_for(lambda: stack.is_at_rest)
    pages = [await stack.record(record["id"]) for record in (await stack.get("/debug/requests")).json()["data"]]
    migrated = [page for page in pages if page["migrations"]]
    assert migrated
    for page in migrated:
        assert (page["routes"][0]["setback"]["event"], page["routes"][0]["setback"]["cause"]) == ("broken off", "the engine raised")
        assert page["routes"][1]["setback"] is None
        assert page["routes"][1]["tokens"] == 5
        assert "broken off" in [moment["event"] for moment in page["timeline"]]


def test_history_is_bounded() -> None:
    history = History()
    for number in range(1000):
        history.add(Attempt(WHOLE, number, 40, is_split=False))
        history.note(number, "refused")
    history.note(1000, "ended", detail="stop")
    assert len(history.attempts) == MAX_ATTEMPTS
    assert (history.attempts[0].at_ns, history.attempts[-1].at_ns) == (0, 999)
    assert len(history.moments) == MAX_MOMENTS
    assert [moment.at_ns for moment in history.moments[-2:]] == [999, 1000], "what came of it in the end is what one wants to know"
    assert history.moments[0].at_ns == 0


def test_after_a_migration_the_prediction_is_still_that_of_the_report() -> None:
    """Headers and records show both; the second attempt finds what the first one computed, and that is no hit."""
    sequence = SequenceRecord(started_ns=0)
    here = Placement(Leg.BOTH, WorkerId("v"), Epoch(1), 0, (Candidate(WorkerId("v"), 1.0, 0, 0, 0, 0),))
    nothing = Route(RequestId("r"), here, None, "whole: short", "short-prompt")
    sequence.history.add(Attempt(nothing, 1, 40, is_split=False))
    assert sequence.predicted_cached_tokens == 0
    stats = PhaseStats(cached_token_count=0)
    sequence.note_stats(stats)
    sequence.history.attempts[0].note_stats(stats, of_prefill_leg=False)
    sequence.note_tokens(1, 2)
    sequence.history.add(Attempt(WHOLE, 3, 41, is_split=False))
    assert (sequence.predicted_cached_tokens, sequence.cached_tokens) == (0, 0)


def test_predicted_and_reported_stand_side_by_side() -> None:
    attempt = Attempt(WHOLE, 5_000_000, 40, is_split=False)
    attempt.note_stats(PhaseStats(cached_token_count=16, queue_ms=1.5), of_prefill_leg=False)
    page = attempt.as_json(0)
    (leg,) = page["legs"]
    assert page["at_ms"] == 5.0
    assert (leg["predicted_cached_tokens"], leg["reported_cached_tokens"], leg["queue_ms"]) == (32, 16, 1.5)
    assert [(row["worker"], row["cached_tokens"], row["tokens_to_compute"]) for row in leg["candidates"]] == [("w", 32, 8), ("v", 0, 40)]
