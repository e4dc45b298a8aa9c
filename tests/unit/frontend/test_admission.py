"""Requests wait at the frontend while its workers are saturated: in order, with an end, and without a trace left behind."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import msgspec
import pytest

from polyphase.frontend.settings import FrontendSettings
from polyphase.frontend.terms import DEADLINE_HEADER, TENANT_HEADER, terms_of
from polyphase.router import AdmissionSettings

from .fake_worker import FakeWorker
from .stack import Stack, wait_for

TEXT = "/v1/completions"
BODY = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 2, "return_token_ids": True}


async def busy_worker(stack: Stack, name: str = "worker-0", labels: dict[str, str] | None = None) -> FakeWorker:
    """It runs two requests, and a third that waits there would be one too many."""
    worker = await stack.add(name, card=msgspec.structs.replace(stack.card, max_running=2), labels=labels)
    worker.behaviour.gate = asyncio.Semaphore(0)
    return worker


def ask(stack: Stack, headers: dict[str, str] | None = None, **fields: Any) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(stack.post(TEXT, {**BODY, **fields}, headers=headers or {}))


async def fill(stack: Stack, worker: FakeWorker, count: int = 3) -> list[asyncio.Task[httpx.Response]]:
    tasks = [ask(stack) for _ in range(count)]
    await wait_for(lambda: len(worker.running) == count)
    return tasks


async def queued(stack: Stack, count: int) -> None:
    await wait_for(lambda: len(stack.services.dispatcher.waiting_room) == count)


def figure(stack: Stack, name: str, **labels: str) -> float:
    return stack.services.metrics.registry.get_sample_value(f"polyphase_frontend_{name}", {"model": "tiny", **labels}) or 0.0


def release(worker: FakeWorker) -> None:
    assert worker.behaviour.gate is not None
    for _ in range(1000):
        worker.behaviour.gate.release()


async def test_who_waits_is_served_when_there_is_room(stack: Stack) -> None:
    worker = await busy_worker(stack)
    running = await fill(stack, worker)
    waiting = [ask(stack) for _ in range(5)]
    await queued(stack, 5)
    assert len(worker.submits) == 3
    assert figure(stack, "queued_requests") == 5
    (queue,) = (await stack.get("/health")).json()["models"]["tiny"]["queues"]
    assert (queue["requests"], queue["waits_for_prefill_worker"], queue["drain_time_s"]) == (5, False, None)
    release(worker)
    answers = await asyncio.gather(*running, *waiting)
    assert [answer.status_code for answer in answers] == [200] * 8
    assert all(len(answer.json()["choices"][0]["token_ids"]) == 2 for answer in answers)
    assert figure(stack, "queued_requests") == 0
    assert figure(stack, "queue_wait_seconds_count") == 5
    await wait_for(lambda: stack.is_at_rest)
    page = await stack.record(answers[-1].headers["x-request-id"])
    assert [moment["event"] for moment in page["timeline"]] == ["accepted", "queued", "admitted", "sent", "first token", "ended"]
    assert "every worker is busy" in page["timeline"][1]["detail"]
    assert page["admission_wait_ms"] > 0
    assert (await stack.record(answers[0].headers["x-request-id"]))["admission_wait_ms"] == 0


async def test_the_urgent_go_first_and_tenants_take_turns(stack: Stack) -> None:
    worker = await busy_worker(stack)
    running = await fill(stack, worker)
    waiting: list[asyncio.Task[httpx.Response]] = []
    orders = [("flood", 0)] * 4 + [("calm", 0)] * 2 + [("late", 9), ("urgent", -9)]
    for number, (tenant, priority) in enumerate(orders):
        waiting.append(ask(stack, {TENANT_HEADER: tenant}, priority=priority, prompt=[number, 1, 1]))
        await queued(stack, number + 1)
    release(worker)
    await asyncio.gather(*running, *waiting)
    order = [orders[submit.token_ids[0]][0] for submit in worker.submits[3:]]
    assert order == ["urgent", "flood", "calm", "flood", "calm", "flood", "flood", "late"]
    await wait_for(lambda: stack.is_at_rest)


async def test_who_requires_a_label_waits_for_those_that_carry_it_only(stack: Stack) -> None:
    """Others go on meanwhile; and what clients write is forgotten when nobody waits for it any more."""
    plain = await stack.add("worker-0")
    worker = await busy_worker(stack, "worker-1", labels={"zone": "eu"})
    running = [ask(stack, {"x-polyphase-require": "zone=eu"}) for _ in range(3)]
    await wait_for(lambda: len(worker.running) == 3)
    waiting = ask(stack, {"x-polyphase-require": "zone=eu"})
    await queued(stack, 1)
    assert (await stack.post(TEXT, BODY)).status_code == 200
    assert len(plain.submits) == 1
    release(worker)
    assert [answer.status_code for answer in await asyncio.gather(*running, waiting)] == [200] * 4
    assert not [lane for lane in stack.services.dispatcher.waiting_room._lanes.values() if lane.key[3]]
    await wait_for(lambda: stack.is_at_rest)


async def test_a_client_that_goes_away_gives_its_place_up(stack: Stack) -> None:
    worker = await busy_worker(stack)
    running = await fill(stack, worker)
    waiting = [ask(stack), ask(stack)]
    await queued(stack, 2)
    waiting[0].cancel()
    await queued(stack, 1)
    release(worker)
    answers = await asyncio.gather(*running, waiting[1])
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len(worker.submits) == 4, "nothing was sent for whoever went away"
    await wait_for(lambda: stack.is_at_rest)


@pytest.mark.parametrize("settings", [FrontendSettings(admission=AdmissionSettings(max_requests=1))])
async def test_a_full_queue_rejects_at_once_and_gives_way_to_the_urgent(stack: Stack) -> None:
    worker = await busy_worker(stack)
    running = await fill(stack, worker)
    waiting = ask(stack)
    await queued(stack, 1)
    rejected = await stack.post(TEXT, BODY)
    assert (rejected.status_code, rejected.json()["error"]["code"]) == (429, "overloaded")
    assert int(rejected.headers["retry-after"]) >= 1
    assert figure(stack, "admission_rejections_total", reason="queue_full") == 1
    urgent = ask(stack, priority=-1, stream=True)
    evicted = await waiting
    assert (evicted.status_code, evicted.json()["error"]["code"]) == (429, "evicted")
    assert int(evicted.headers["retry-after"]) >= 1
    assert figure(stack, "admission_evictions_total", reason="displaced") == 1
    assert figure(stack, "admission_rejections_total", reason="queue_full") == 1
    release(worker)
    assert [answer.status_code for answer in await asyncio.gather(*running, urgent)] == [200] * 4
    metrics = (await stack.get("/metrics")).text
    assert 'model_rejection_total{code="overloaded"} 1.0' in metrics
    assert 'code="evicted"' not in metrics, "rejected and evicted are counted apart"
    await wait_for(lambda: stack.is_at_rest)


async def test_who_cannot_begin_in_time_is_evicted(stack: Stack) -> None:
    worker = await busy_worker(stack)
    running = await fill(stack, worker)
    answers = await asyncio.gather(
        ask(stack, {DEADLINE_HEADER: "150"}),
        ask(stack, {"x-stainless-read-timeout": "0.15"}, stream=True),
    )
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "evicted")
        assert int(answer.headers["retry-after"]) >= 1
    assert figure(stack, "admission_evictions_total", reason="deadline") == 2
    page = await stack.record(answers[0].headers["x-request-id"])
    assert page["admission_wait_ms"] >= 100
    assert not page["routes"]
    assert len(worker.submits) == 3
    release(worker)
    await asyncio.gather(*running)
    await wait_for(lambda: stack.is_at_rest)


async def test_a_deadline_of_the_client_ends_what_runs_and_is_told_to_the_worker(stack: Stack) -> None:
    worker = await busy_worker(stack)
    answer = await stack.post(TEXT, BODY, headers={DEADLINE_HEADER: "200"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    (submit,) = worker.submits
    assert submit.remaining_ms is not None
    assert 0 < submit.remaining_ms <= 200
    await wait_for(lambda: worker.cancels == [submit.request_id])
    await wait_for(lambda: stack.is_at_rest)


async def test_choices_wait_and_leave_together(stack: Stack) -> None:
    worker = await busy_worker(stack)
    running = await fill(stack, worker)
    several = ask(stack, n=3)
    await queued(stack, 1)
    assert len(worker.submits) == 3
    release(worker)
    answer = await several
    assert len(answer.json()["choices"]) == 3
    await asyncio.gather(*running)
    await wait_for(lambda: stack.is_at_rest)


async def test_a_worker_that_joins_takes_who_waits(stack: Stack) -> None:
    worker = await busy_worker(stack)
    running = await fill(stack, worker)
    waiting = [ask(stack), ask(stack)]
    await queued(stack, 2)
    await stack.add("worker-1")
    assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200, 200]
    release(worker)
    await asyncio.gather(*running)
    await wait_for(lambda: stack.is_at_rest)


@pytest.mark.parametrize("settings", [FrontendSettings(migration_patience_s=20)])
async def test_what_was_promised_an_answer_goes_first(stack: Stack, story: list[int]) -> None:
    """A worker dies: its requests go on elsewhere before anything that only waits, and are not refused for fullness."""
    first = await busy_worker(stack, "worker-0")
    running = await fill(stack, first)
    waiting = [ask(stack, prompt=[9, 9, 9]) for _ in range(4)]
    await queued(stack, 4)
    first.behaviour.gate.release()  # type: ignore[union-attr]
    await stack.kill("worker-0")
    second = await busy_worker(stack, "worker-1")
    await wait_for(lambda: len(second.submits) >= 3)
    assert [submit.token_ids[:3] for submit in second.submits[:3]] == [[1, 2, 3]] * 3
    release(second)
    answers = await asyncio.gather(*running, *waiting)
    assert [answer.status_code for answer in answers] == [200] * 7
    assert all(answer.json()["choices"][0]["token_ids"] == story[:2] for answer in answers)
    await wait_for(lambda: stack.is_at_rest)


@pytest.mark.parametrize("settings", [FrontendSettings(migration_patience_s=0.2)])
async def test_without_any_worker_left_the_queue_is_told(stack: Stack) -> None:
    worker = await busy_worker(stack)
    running = await fill(stack, worker)
    waiting = ask(stack)
    await queued(stack, 1)
    await stack.kill("worker-0")
    answer = await waiting
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_workers")
    assert int(answer.headers["retry-after"]) >= 1
    assert figure(stack, "admission_evictions_total", reason="no_workers") == 1
    assert [one.status_code for one in await asyncio.gather(*running)] == [503] * 3
    await wait_for(lambda: stack.is_at_rest)


async def test_a_frontend_that_must_go_ends_what_waits(stack: Stack) -> None:
    worker = await busy_worker(stack)
    tasks = [*await fill(stack, worker), ask(stack)]
    await queued(stack, 1)
    stack.server.stop_now()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    statuses = [answer.status_code for answer in answers if isinstance(answer, httpx.Response)]
    assert all(status >= 500 for status in statuses)
    assert len(stack.services.dispatcher.waiting_room) == 0
    assert stack.router.bookings.total().is_zero()


# What clients say


@pytest.mark.parametrize(
    ("header", "value"),
    [
        (DEADLINE_HEADER, "0"),
        (DEADLINE_HEADER, "-5"),
        (DEADLINE_HEADER, "1.5"),
        (DEADLINE_HEADER, "soon"),
        (DEADLINE_HEADER, ""),
        (DEADLINE_HEADER, "9" * 5000),
        (DEADLINE_HEADER, "١٢"),
        (TENANT_HEADER, ""),
        (TENANT_HEADER, "a b"),
        (TENANT_HEADER, "x" * 129),
        (TENANT_HEADER, "naïve"),
    ],
)
async def test_malformed_headers(stack: Stack, header: str, value: str) -> None:
    worker = await stack.add("worker-0")
    answer = await stack.post(TEXT, BODY, headers=[(header.encode(), value.encode())])
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (header, "invalid_request_error")
    assert header in error["message"]
    assert not worker.submits


async def test_odd_hints_of_a_clients_library_are_ignored(stack: Stack) -> None:
    await stack.add("worker-0")
    for hint in ("", "0", "-1", "inf", "nan", "NOT_GIVEN", "1e9999", "9" * 400):
        answer = await stack.post(TEXT, BODY, headers={"x-stainless-read-timeout": hint})
        assert answer.status_code == 200, hint


def scope(**headers: str) -> dict[str, Any]:
    return {"headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]}


def test_who_asks() -> None:
    settings = FrontendSettings()

    def tenant(user: str | None = None, **headers: str) -> str:
        return terms_of(scope(**headers), user, settings, 0).tenant

    assert tenant() == "default"
    assert tenant("") == "default"
    assert tenant("alice") == tenant("alice") != tenant("bob")
    assert "alice" not in tenant("alice")
    key = tenant("alice", authorization="Bearer sk-secret")
    assert key == tenant("bob", authorization="bearer  sk-secret")
    assert key.startswith("key-")
    assert "secret" not in key
    assert tenant("alice", authorization="Bearer sk-secret", x_polyphase_tenant="acme/eu") == "acme/eu"
    assert tenant("\ud800") != "default"


def test_until_when() -> None:
    settings = FrontendSettings(request_timeout_s=100, admission=AdmissionSettings(max_wait_s=10))
    usual = terms_of(scope(), None, settings, 5)
    assert (usual.deadline_ns, usual.leave_by_ns) == (5 + 100 * 10**9, 5 + 10 * 10**9)
    short = terms_of(scope(x_polyphase_deadline_ms="2000"), None, settings, 5)
    assert short.deadline_ns == short.leave_by_ns == 5 + 2 * 10**9
    assert terms_of(scope(x_polyphase_deadline_ms="500000"), None, settings, 5) == usual
    impatient = terms_of(scope(x_stainless_read_timeout="1.5"), None, settings, 0)
    assert (impatient.deadline_ns, impatient.leave_by_ns) == (100 * 10**9, 1_500_000_000)
