"""Streams that change their worker without its death: roles, drains, stalls, cut connections. The client sees one answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from polyphase.frontend.settings import FrontendSettings
from polyphase.frontend.stall import StallRule
from polyphase.testing.connections import cut_connections
from polyphase.wire.cards import Role
from polyphase.wire.events import Load

from .fake_worker import FakeWorker
from .stack import Stack, wait_for
from .test_faults import LONG_PROMPT, PROMPT, ask, ids_of, open_stream, slow, told

QUICK = FrontendSettings(
    migration_patience_s=0.3, request_timeout_s=30, drain_patience_s=0.05, stall=StallRule(interval_s=0.02, least_s=0.2, unknown_s=0.5)
)


def set_role(worker: FakeWorker, role: Role) -> None:
    worker.update(msgspec.structs.replace(worker.entry, role=role))


async def busy_one(stack: Stack) -> FakeWorker:
    await wait_for(lambda: any(worker.running for worker in stack.workers.values()))
    return next(worker for worker in stack.workers.values() if worker.running)


@pytest.mark.parametrize("settings", [QUICK])
@pytest.mark.parametrize("how", ["role", "drain"])
async def test_a_stream_moves_with_its_blocks(stack: Stack, how: str) -> None:
    workers = [await stack.add(f"decode-{number}", Role.DECODE) for number in range(2)]
    slow(*workers)
    async with open_stream(stack) as stream:
        await stream.read(5)
        first = await busy_one(stack)
        if how == "role":
            set_role(first, Role.PREFILL)
        else:
            first.update(msgspec.structs.replace(first.entry, is_draining=True))
        await stream.read()
    assert (stream.ids, stream.finish, stream.is_done) == (told(stack.story), "length", True)
    second = next(worker for worker in workers if worker is not first)
    [submit] = second.submits
    assert submit.offer is not None
    assert submit.offer.worker_id == first.worker_id
    record = await stack.record(stream.response.headers["x-request-id"])
    assert (record["moves"], record["migrations"], record["decode_worker"]) == (1, 0, second.worker_id)
    cause = f"worker {first.worker_id} {'is a prefill worker now' if how == 'role' else 'drains'}"
    assert record["routes"][-2]["setback"] == {"event": "moved", "worker": first.worker_id, "cause": cause}
    await wait_for(lambda: stack.is_at_rest)
    assert first.leases == set()
    assert 'model_move_total{model="tiny"} 1.0' in (await stack.get("/metrics")).text


@pytest.mark.parametrize("settings", [QUICK])
async def test_the_last_worker_that_decodes_keeps_its_streams_until_another_comes(stack: Stack) -> None:
    first = await stack.add("decode-0", Role.DECODE)
    slow(first)
    async with open_stream(stack, max_tokens=200) as stream:
        await stream.read(5)
        set_role(first, Role.PREFILL)
        await wait_for(lambda: stack.router.workers()[0].facts.role is Role.PREFILL)
        assert (await stack.get("/health")).json()["models"]["tiny"]["notes"] == [
            "no decode worker is there: prefill workers serve requests whole, if their engine can"
        ]
        await stream.read(20)
        assert ids_of(await ask(stack)) == told(stack.story), "served whole"
        second = await stack.add("decode-1", Role.DECODE)
        await stream.read()
    assert stream.ids == told(stack.story, 200)
    assert second.submits
    await wait_for(lambda: stack.is_at_rest)


@pytest.mark.parametrize("settings", [QUICK])
async def test_a_first_leg_that_finds_its_decode_worker_changed_goes_to_another(stack: Stack) -> None:
    prefill = await stack.add("prefill-0", Role.PREFILL)
    workers = {f"decode-{number}": await stack.add(f"decode-{number}", Role.DECODE) for number in range(2)}
    prefill.behaviour.gate = asyncio.Semaphore(0)
    asked = asyncio.create_task(ask(stack, LONG_PROMPT))
    await wait_for(lambda: prefill.running)
    [flight] = stack.services.dispatcher._flights.values()
    assert flight.route is not None
    chosen = workers.pop(flight.route.decode.worker_id)
    set_role(chosen, Role.PREFILL)
    await wait_for(lambda: any(v.facts.worker_id == chosen.worker_id and v.facts.role is Role.PREFILL for v in stack.router.workers()))
    prefill.behaviour.gate.release()
    assert ids_of(await asked) == told(stack.story)
    [other] = workers.values()
    assert other.submits[0].offer is not None
    assert not chosen.submits
    await wait_for(lambda: stack.is_at_rest)


async def test_refusals_of_a_changed_role_lead_elsewhere_and_count_as_no_migration(stack: Stack) -> None:
    changed, other = await stack.add("worker-0"), await stack.add("worker-1")
    changed.behaviour.refuses = "role_changed"
    for _ in range(6):
        answer = await ask(stack)
        assert ids_of(answer) == told(stack.story)
        assert (await stack.record(answer.headers["x-request-id"]))["migrations"] == 0
    assert changed.submits
    assert len(other.submits) == 6
    other.behaviour.refuses = "role_changed"
    assert (await ask(stack)).status_code == 503  # both again and again, until patience is over
    await wait_for(lambda: stack.is_at_rest)


@contextlib.asynccontextmanager
async def heartbeats(*workers: FakeWorker) -> AsyncIterator[None]:
    """Often, and true."""

    async def beat() -> None:
        while True:
            for worker in workers:
                worker.publish(load=Load(step=worker._step, running_count=len(worker.running)))
            await asyncio.sleep(0.05)

    for worker in workers:
        worker.behaviour.is_silent = True  # but for these
    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        beating.cancel()


@pytest.mark.parametrize("settings", [QUICK])
@pytest.mark.parametrize("fields", [{"stream": True}, {"stream": False}, {"stream": True, "n": 2, "logprobs": 1}])
async def test_requests_leave_a_worker_that_is_stuck_and_it_comes_back(stack: Stack, fields: dict[str, Any]) -> None:
    stuck = await stack.add("stuck-0")
    stuck.behaviour.gate = asyncio.Semaphore(3)
    asked = asyncio.create_task(ask(stack, **fields))
    await wait_for(lambda: stuck.running and stuck.behaviour.gate is not None and stuck.behaviour.gate.locked())
    stuck.running["another frontend's"] = asyncio.create_task(asyncio.sleep(60))
    well = await stack.add("well-0")
    async with heartbeats(stuck, well):
        answer = await asked
        assert answer.status_code == 200
        if not fields["stream"]:
            assert ids_of(answer) == told(stack.story)
        else:
            events = [msgspec.json.decode(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            choices = [choice for event in events for choice in event["choices"]]
            for index in range(fields.get("n", 1)):
                of_choice = [choice for choice in choices if choice["index"] == index]
                assert [i for choice in of_choice for i in choice["token_ids"]] == told(stack.story)
                assert [choice["finish_reason"] for choice in of_choice if choice["finish_reason"]] == ["length"]
        assert stuck.cancels, "it is told not to go on, should it come round"
        assert well.submits
        await wait_for(lambda: stalled_workers(stack) == {"stuck-0"})
        before = len(stuck.submits)
        assert ids_of(await ask(stack)) == told(stack.story)
        assert len(stuck.submits) == before
        assert (await stack.get("/health")).json()["models"]["tiny"]["workers"]["stuck-0"]["is_stalled"]
        stuck._step += 1
        await wait_for(lambda: not stalled_workers(stack))
        stuck.running.pop("another frontend's").cancel()
    await wait_for(lambda: stack.is_at_rest)


def stalled_workers(stack: Stack) -> set[str]:
    return {view.facts.worker_id for view in stack.router.workers() if view.facts.is_stalled}


@pytest.mark.parametrize("settings", [QUICK])
async def test_the_only_worker_keeps_what_it_has_and_gets_no_more(stack: Stack) -> None:
    stuck = await stack.add("stuck-0")
    gate = stuck.behaviour.gate = asyncio.Semaphore(3)
    asked = asyncio.create_task(ask(stack))
    await wait_for(lambda: stuck.running and stuck.behaviour.gate is not None and stuck.behaviour.gate.locked())
    async with heartbeats(stuck):
        await wait_for(lambda: stalled_workers(stack))
        refused = await ask(stack, PROMPT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_workers")
        assert "stands still" in refused.json()["error"]["message"]
        assert (await stack.get("/health")).status_code == 503
        for _ in range(50):
            gate.release()
        assert ids_of(await asked) == told(stack.story), "it was not taken away from where it could go on"
        await wait_for(lambda: not stalled_workers(stack))
        assert ids_of(await ask(stack, max_tokens=5)) == told(stack.story, 5)


async def test_cut_connections_are_not_the_request_s_fault(stack: Stack) -> None:
    """More of them than a request may have workers that failed it."""
    worker = await stack.add("worker-0")
    slow(worker)
    path = Path(worker.entry.request_endpoint.removeprefix("ipc://"))
    async with open_stream(stack) as stream:
        for turn in range(5):
            await stream.read(5 * turn + 3)
            assert cut_connections(os.getpid(), path) == 1
        await stream.read()
    assert (stream.ids, stream.finish, stream.error) == (told(stack.story), "length", None)
    assert (await stack.record(stream.response.headers["x-request-id"]))["migrations"] == 5


@pytest.mark.parametrize("count", [1, 2])
async def test_a_cut_connection_loses_no_token(stack: Stack, count: int) -> None:
    workers = [await stack.add(f"worker-{number}") for number in range(count)]
    slow(*workers)
    async with open_stream(stack) as stream:
        await stream.read(5)
        worker = await busy_one(stack)
        assert cut_connections(os.getpid(), Path(worker.entry.request_endpoint.removeprefix("ipc://"))) == 1
        await stream.read()
    assert (stream.ids, stream.finish, stream.is_done) == (told(stack.story), "length", True)
    await wait_for(lambda: sum(len(worker.submits) for worker in workers) == 2)
    assert (await stack.record(stream.response.headers["x-request-id"]))["migrations"] == 1
    assert ids_of(await ask(stack)) == told(stack.story)
