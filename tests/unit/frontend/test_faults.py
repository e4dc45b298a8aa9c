"""Clients that leave, workers that die, stall, refuse and fail; and that nothing stays booked, running or leased afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from typing import Any

import httpx
import msgspec
import openai
import pytest

from polyphase.core.hashing import sequence_hashes
from polyphase.core.ids import WorkerId
from polyphase.frontend.settings import FrontendSettings
from polyphase.router import AdmissionSettings
from polyphase.wire.cards import Role
from polyphase.wire.events import BlocksStored
from polyphase.wire.requests import WireFailure

from .fake_worker import FakeWorker
from .stack import Stack, wait_for

PROMPT = [5, 6, 7]
LONG_PROMPT = [5] * 100
PATIENT = FrontendSettings(migration_patience_s=5, request_timeout_s=30)


async def ask(stack: Stack, prompt: list[int] = PROMPT, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 40, "return_token_ids": True, **fields}
    return await stack.post("/v1/completions", body)


def ids_of(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["token_ids"])


def told(story: list[int], count: int = 40) -> list[int]:
    return [story[i % len(story)] for i in range(count)]


class Stream:
    """A streamed completion, read event by event."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.lines = response.aiter_lines()
        self.ids: list[int] = []
        self.finish: str | None = None
        self.error: dict[str, Any] | None = None
        self.is_done = False

    async def read(self, count: int | None = None) -> None:
        """Until there are `count` tokens, or to the end."""
        while count is None or len(self.ids) < count:
            line = await anext(self.lines, None)
            if line is None:
                return
            if line == "data: [DONE]":
                self.is_done = True
            elif line.startswith("data: "):
                event = msgspec.json.decode(line[6:])
                self.error = event.get("error", self.error)
                for choice in event.get("choices", []):
                    self.ids += choice["token_ids"]
                    self.finish = choice["finish_reason"] or self.finish


@contextlib.asynccontextmanager
async def open_stream(stack: Stack, prompt: list[int] = PROMPT, **fields: Any) -> Any:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 40, "return_token_ids": True, "stream": True, **fields}
    async with (
        httpx.AsyncClient(timeout=20) as client,
        client.stream("POST", f"{stack.url}/v1/completions", json=body) as response,
    ):
        yield Stream(response)


def slow(*workers: FakeWorker) -> None:
    for worker in workers:
        worker.behaviour.step_s = 0.005


# Nothing to serve


async def test_no_worker_is_503_at_once(stack: Stack) -> None:
    answer = await ask(stack)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == "no_workers"
    assert answer.json()["error"]["type"] == "service_unavailable_error"
    assert (await stack.get("/health")).status_code == 503
    assert (await stack.get("/live")).status_code == 200


async def test_a_model_whose_workers_are_gone_is_503_not_404(stack: Stack) -> None:
    await stack.add("worker-0")
    other = msgspec.structs.replace(stack.card, name="other")
    await stack.add("other-0", card=other)
    await stack.kill("other-0")
    await wait_for(lambda: stack.services.models.names() == ["tiny"])
    assert (await stack.post("/v1/completions", {"model": "other", "prompt": "x"})).status_code == 503
    assert (await stack.post("/v1/completions", {"model": "never", "prompt": "x"})).status_code == 404
    assert (await stack.get("/health")).status_code == 200


async def test_draining_workers_take_nothing_new(stack: Stack) -> None:
    worker = await stack.add("worker-0")
    worker.update(msgspec.structs.replace(worker.entry, is_draining=True))
    await wait_for(lambda: stack.router.workers()[0].facts.is_draining)
    assert (await ask(stack)).status_code == 503
    assert (await stack.get("/health")).status_code == 503


# Clients that leave


@pytest.mark.parametrize("is_streaming", [True, False])
@pytest.mark.parametrize("is_stalled", [True, False])
async def test_a_client_that_leaves(stack: Stack, is_streaming: bool, is_stalled: bool) -> None:
    worker = await stack.add("worker-0")
    slow(worker)
    worker.behaviour.is_stalled = is_stalled
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 500, "stream": is_streaming}
    client = httpx.AsyncClient(timeout=20)
    request = asyncio.create_task(client.post(f"{stack.url}/v1/completions", json=body))
    await wait_for(lambda: worker.running)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    await client.aclose()
    await wait_for(lambda: stack.is_at_rest)
    assert worker.cancels == [worker.submits[0].request_id]
    await wait_for(lambda: stack.services.records.latest(1)[0].status == "cancelled")
    [record] = stack.services.records.latest(1)
    assert record.finish_reason == "cancelled"
    metrics = (await stack.get("/metrics")).text
    assert 'polyphase_frontend_model_cancellation_total{model="tiny"} 1.0' in metrics


async def test_a_client_that_leaves_while_its_write_is_pending(stack: Stack) -> None:
    """It reads nothing, so that the server's buffers are full, and then it goes."""
    worker = await stack.add("worker-0")
    worker.behaviour.tokens_per_step = 100
    _, writer = await asyncio.open_connection(*stack.url.removeprefix("http://").split(":"), limit=1024)
    body = b'{"model": "tiny", "prompt": [5], "max_tokens": 400, "n": 16, "stream": true, "logprobs": 20}'
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body))
    writer.write(body)
    await wait_for(lambda: len(worker.submits) == 16)
    writer.transport.abort()
    await wait_for(lambda: stack.is_at_rest)
    await wait_for(lambda: stack.services.door.inside_count == 0)


@pytest.mark.parametrize("stage", ["prefill", "handed over"])
async def test_a_client_that_leaves_a_split_request(stack: Stack, stage: str) -> None:
    prefill, decode = await stack.add("prefill-0", Role.PREFILL), await stack.add("decode-0", Role.DECODE)
    stalled = prefill if stage == "prefill" else decode
    stalled.behaviour.is_stalled = True
    client = httpx.AsyncClient(timeout=20)
    body = {"model": "tiny", "prompt": LONG_PROMPT, "max_tokens": 40}
    request = asyncio.create_task(client.post(f"{stack.url}/v1/completions", json=body))
    await wait_for(lambda: stalled.running)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    await client.aclose()
    await wait_for(lambda: stack.is_at_rest)
    assert stalled.cancels
    if stage == "handed over":
        assert prefill.released == [f"lease-{prefill.submits[0].request_id}"], (
            "the blocks that nobody takes must not wait for the lease's end"
        )


# Workers that die


async def test_a_worker_dies_in_mid_stream(stack: Stack, story: list[int]) -> None:
    slow(await stack.add("worker-0"), await stack.add("worker-1"))
    async with open_stream(stack, seed=3, logprobs=1) as stream:
        await stream.read(10)
        victim = stream.response.headers["x-polyphase-decode-worker"]
        await stack.kill(victim)
        await stream.read()
        request_id = stream.response.headers["x-request-id"]
    assert stream.ids == told(story)
    assert (stream.finish, stream.error, stream.is_done) == ("length", None, True)
    [survivor] = stack.workers.values()
    submit = survivor.submits[0]
    assert submit.prompt_token_count == len(PROMPT)
    assert submit.token_ids[:3] == PROMPT
    assert len(submit.token_ids) >= 13
    assert submit.sampling.seed == 3
    assert submit.stop.max_tokens == 40
    record = await stack.record(request_id)
    assert record["migrations"] == 1
    assert record["decode_worker"] == survivor.worker_id != victim
    await wait_for(lambda: stack.is_at_rest)
    assert 'model_migration_total{model="tiny"} 1.0' in (await stack.get("/metrics")).text


async def test_many_streams_survive_a_death(stack: Stack, story: list[int]) -> None:
    slow(*[await stack.add(f"worker-{i}") for i in range(3)])
    asked = [asyncio.create_task(ask(stack)) for _ in range(24)]
    await wait_for(lambda: sum(len(worker.submits) for worker in stack.workers.values()) == 24)
    await asyncio.sleep(0.03)
    await stack.kill("worker-1")
    answers = await asyncio.gather(*asked)
    assert [ids_of(answer) for answer in answers] == [told(story)] * 24
    await wait_for(lambda: stack.is_at_rest)


async def test_a_restarted_worker_is_another_life(stack: Stack, story: list[int]) -> None:
    """Its old requests go on at its new life, if that is all there is."""
    slow(await stack.add("worker-0"))
    async with open_stream(stack) as stream:
        await stream.read(5)
        await stack.kill("worker-0")
        slow(await stack.add_unready("worker-0"))
        await stream.read()
    assert stream.ids == told(story)
    await wait_for(lambda: stack.is_at_rest)


async def test_a_prefill_worker_dies(stack: Stack, story: list[int]) -> None:
    decode = await stack.add("decode-0", Role.DECODE)
    victim = await stack.add("prefill-0", Role.PREFILL)
    victim.behaviour.is_stalled = True
    asked = asyncio.create_task(ask(stack, LONG_PROMPT))
    await wait_for(lambda: victim.running)
    await stack.add("prefill-1", Role.PREFILL)
    await stack.kill("prefill-0")
    assert ids_of(await asked) == told(story)
    assert decode.submits[0].offer is not None
    assert decode.submits[0].offer.worker_id == "prefill-1"
    await wait_for(lambda: stack.is_at_rest)


async def test_the_only_prefill_worker_dies(stack: Stack, story: list[int]) -> None:
    await stack.add("decode-0", Role.DECODE)
    victim = await stack.add("prefill-0", Role.PREFILL)
    victim.behaviour.is_stalled = True
    asked = asyncio.create_task(ask(stack, LONG_PROMPT))
    await wait_for(lambda: victim.running)
    await stack.kill("prefill-0")
    assert ids_of(await asked) == told(story)
    await wait_for(lambda: stack.is_at_rest)


async def test_the_decode_worker_dies_while_prefill_runs(stack: Stack, story: list[int]) -> None:
    prefill = await stack.add("prefill-0", Role.PREFILL)
    slow(prefill)
    prefill.behaviour.step_s = 0.3
    await stack.add("decode-0", Role.DECODE)
    asked = asyncio.create_task(ask(stack, LONG_PROMPT))
    await wait_for(lambda: prefill.running)
    other = await stack.add("decode-1", Role.DECODE)
    await stack.kill("decode-0")
    assert ids_of(await asked) == told(story)
    assert len(prefill.submits) == 1, "what prefill computed is not computed again"
    assert other.submits[0].offer is not None
    await wait_for(lambda: stack.is_at_rest)


async def test_the_decode_worker_dies_before_it_took_the_blocks(stack: Stack, story: list[int]) -> None:
    prefill, victim = await stack.add("prefill-0", Role.PREFILL), await stack.add("decode-0", Role.DECODE)
    victim.behaviour.is_stalled = True
    asked = asyncio.create_task(ask(stack, LONG_PROMPT))
    await wait_for(lambda: victim.running)
    other = await stack.add("decode-1", Role.DECODE)
    await stack.kill("decode-0")
    assert ids_of(await asked) == told(story)
    assert len(prefill.submits) == 1
    first, second = victim.submits[0].offer, other.submits[0].offer
    assert first is not None
    assert second is not None
    assert second.lease_id == first.lease_id
    await wait_for(lambda: stack.is_at_rest)


async def test_all_die_in_mid_stream(stack: Stack) -> None:
    slow(await stack.add("worker-0"))
    async with open_stream(stack) as stream:
        await stream.read(5)
        await stack.kill("worker-0")
        await stream.read()
    assert stream.error is not None
    assert stream.error["code"] == "worker_lost"
    assert set(stream.error) == {"message", "type", "param", "code"}
    assert stream.finish is None
    assert stream.is_done
    await wait_for(lambda: stack.is_at_rest)
    assert stack.services.records.latest(1)[0].status == "failed"


async def test_the_official_client_sees_an_error_in_the_stream(stack: Stack) -> None:
    slow(await stack.add("worker-0"))
    stream = await stack.client().completions.create(model="tiny", prompt="x", max_tokens=40, stream=True)
    await anext(aiter(stream))
    await stack.kill("worker-0")
    with pytest.raises(openai.APIError, match="lost"):
        async for _ in stream:
            pass


async def test_the_only_worker_dies_before_the_first_token(stack: Stack) -> None:
    worker = await stack.add("worker-0")
    worker.behaviour.is_stalled = True
    asked = asyncio.create_task(ask(stack, stream=True))
    await wait_for(lambda: worker.running)
    await stack.kill("worker-0")
    answer = await asked
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "worker_lost"
    await wait_for(lambda: stack.is_at_rest)


# Workers that fail, refuse, stall


async def test_a_failure_that_another_worker_may_not_have(stack: Stack, story: list[int]) -> None:
    bad, good = await stack.add("worker-0"), await stack.add("worker-1")
    bad.behaviour.fails_after = 7
    answers = [await ask(stack) for _ in range(4)]
    assert [ids_of(answer) for answer in answers] == [told(story)] * 4
    assert bad.submits
    assert any(len(submit.token_ids) == len(PROMPT) + 7 for submit in good.submits)
    await wait_for(lambda: stack.is_at_rest)


async def test_a_failure_that_no_worker_would_mend(stack: Stack) -> None:
    for worker_id in ("worker-0", "worker-1"):
        worker = await stack.add(worker_id)
        worker.behaviour.fails_after = 0
        worker.behaviour.failure = WireFailure("invalid_value", "this cannot be", False)
    answer = await ask(stack)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "this cannot be"
    assert sum(len(worker.submits) for worker in stack.workers.values()) == 1
    await wait_for(lambda: stack.is_at_rest)


@pytest.mark.parametrize("settings", [dataclasses.replace(PATIENT, migration_limit=2)])
async def test_migrations_are_limited(stack: Stack) -> None:
    for i in range(6):
        (await stack.add(f"worker-{i}")).behaviour.fails_after = 3
    answer = await ask(stack)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "engine_failed"
    assert sum(len(worker.submits) for worker in stack.workers.values()) == 3
    await wait_for(lambda: stack.is_at_rest)


async def test_refused_by_one_worker_taken_by_another(stack: Stack, story: list[int]) -> None:
    full = await stack.add("worker-0")
    await stack.add("worker-1")
    full.behaviour.refuses = "overloaded"
    for _ in range(3):
        assert ids_of(await ask(stack)) == told(story)
    assert full.submits


@pytest.mark.parametrize("settings", [FrontendSettings(admission=AdmissionSettings(max_wait_s=0.2))])
async def test_refused_by_all_is_429(stack: Stack) -> None:
    for worker_id in ("worker-0", "worker-1"):
        (await stack.add(worker_id)).behaviour.refuses = "overloaded"
    answer = await ask(stack)
    assert answer.status_code == 429
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert answer.json()["error"]["code"] == "evicted"
    assert int(answer.headers["retry-after"]) >= 1
    await wait_for(lambda: stack.is_at_rest)


@pytest.mark.parametrize("settings", [FrontendSettings(admission=AdmissionSettings(max_requests=0))])
async def test_full_queues_are_429_at_once(stack: Stack) -> None:
    stack.router._settings = dataclasses.replace(stack.router._settings, max_waiting_requests=0)
    worker = await stack.add("worker-0", card=msgspec.structs.replace(stack.card, max_running=2))
    worker.behaviour.is_stalled = True
    running = [asyncio.create_task(ask(stack)) for _ in range(2)]
    await wait_for(lambda: len(worker.running) == 2)
    answer = await ask(stack)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert 'model_rejection_total{code="overloaded"} 1.0' in (await stack.get("/metrics")).text
    several = await ask(stack, n=3)
    assert several.status_code == 429
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await wait_for(lambda: stack.is_at_rest)


@pytest.mark.parametrize("settings", [FrontendSettings(request_timeout_s=0.2)])
@pytest.mark.parametrize("is_streaming", [True, False])
async def test_a_worker_that_never_answers_is_504(stack: Stack, is_streaming: bool) -> None:
    worker = await stack.add("worker-0")
    worker.behaviour.is_stalled = True
    answer = await ask(stack, stream=is_streaming)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    await wait_for(lambda: stack.is_at_rest)
    assert worker.cancels


async def test_one_of_several_choices_fails(stack: Stack) -> None:
    for worker_id in ("worker-0", "worker-1"):
        worker = await stack.add(worker_id)
        slow(worker)
        worker.behaviour.fails_after = 5
        worker.behaviour.failure = WireFailure("engine_failed", "broken", False)
        slow(worker)  # so that the answer has begun by then
    async with open_stream(stack, n=3) as stream:
        await stream.read()
    assert stream.error is not None
    assert stream.error["code"] == "engine_failed"
    assert stream.is_done
    await wait_for(lambda: stack.is_at_rest)


async def test_a_bug_in_mid_stream_is_told(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = await stack.add("worker-0")
    slow(worker)
    async with open_stream(stack) as stream:
        await stream.read(3)

        def broken(*args: Any) -> Any:
            raise RuntimeError("secret")

        monkeypatch.setattr("polyphase.frontend.assembly.Assembler.feed", broken)
        await stream.read()
    assert stream.error is not None
    assert stream.error["code"] == "internal_error"
    assert "secret" not in stream.error["message"]
    assert stream.is_done
    await wait_for(lambda: stack.is_at_rest)


# Workers that do not belong


async def test_a_worker_with_another_tokenizer_gets_nothing(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    await stack.add("worker-0")
    odd = msgspec.structs.replace(stack.card, vocab_size=stack.card.vocab_size - 1, chat_template="{{ messages }}")
    worker = await stack.add_unready("odd-0", card=odd)
    await wait_for(lambda: "odd-0" in caplog.text)
    assert "chat_template, vocab_size differ" in caplog.text
    assert "chat_template, vocab_size differ" in (await stack.get("/health")).json()["turned_away"]["odd-0"]
    for _ in range(4):
        assert (await ask(stack)).status_code == 200
    assert worker.submits == []


async def test_a_worker_with_a_broken_tokenizer_gets_nothing(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    await stack.add_unready("worker-0", card=msgspec.structs.replace(stack.card, tokenizer_json=b"{}"))
    await wait_for(lambda: "tokenizer.json cannot be read" in caplog.text)
    assert (await ask(stack)).status_code == 503


async def test_a_role_change_is_followed(stack: Stack) -> None:
    worker = await stack.add("worker-0", Role.DECODE)
    worker.update(msgspec.structs.replace(worker.entry, role=Role.PREFILL))
    await wait_for(lambda: stack.router.workers()[0].facts.role is Role.PREFILL)
    assert (await stack.get("/health")).json()["models"]["tiny"]["workers"]["worker-0"]["role"] == "prefill"


# Going away


async def test_drain_finishes_what_runs_and_refuses_what_comes(stack: Stack, story: list[int]) -> None:
    slow(await stack.add("worker-0"))
    async with httpx.AsyncClient() as kept:
        assert (await kept.get(f"{stack.url}/health")).status_code == 200
        async with open_stream(stack, max_tokens=60) as stream:
            await stream.read(3)
            stack.server.stop()
            await wait_for(lambda: stack.services.door.is_closed)
            refused = await kept.post(f"{stack.url}/v1/completions", json={"model": "tiny", "prompt": "x"})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
            assert int(refused.headers["retry-after"]) >= 1
            assert (await kept.get(f"{stack.url}/health")).status_code == 503
            await stream.read()
    assert stream.ids == told(story, 60)
    assert stream.finish == "length"
    assert stream.is_done


@pytest.mark.parametrize("settings", [FrontendSettings(drain_timeout_s=0.1)])
async def test_drain_has_an_end(stack: Stack) -> None:
    worker = await stack.add("worker-0")
    slow(worker)
    async with open_stream(stack, max_tokens=400) as stream:
        await stream.read(2)
        stack.server.stop()
        await stream.read()
    assert stream.error is not None
    assert stream.error["code"] == "draining"
    assert stream.is_done
    await wait_for(lambda: not worker.running)


# KV elsewhere


async def test_after_a_death_the_next_worker_is_told_who_holds_the_prompt(stack: Stack) -> None:
    """A draining worker takes nothing, and gives what it has; what is taken up again is booked until its first token only."""
    for worker_id in ("a", "b", "holder"):
        slow(await stack.add(worker_id))
    holder = stack.workers["holder"]
    size = stack.card.block_size
    prompt = [5] * (20 * size + 1)
    holder.publish([BlocksStored([int(one) for one in sequence_hashes(prompt, size)])])
    await wait_for(lambda: stack.router.indexed_block_count(WorkerId("holder")) == 20)
    holder.update(msgspec.structs.replace(holder.entry, is_draining=True))
    await wait_for(lambda: stack.router.facts_of(WorkerId("holder")).is_draining)  # type: ignore[union-attr]
    async with open_stream(stack, prompt, max_tokens=150) as stream:
        await stream.read(10)
        first = next(worker for worker in stack.workers.values() if worker.running)
        await stack.kill(first.worker_id)
        await stream.read(60)
        second = next(worker for worker in stack.workers.values() if worker.running)
        booked = {view.facts.worker_id: view.booked_prefill_tokens for view in stack.router.workers()}
        assert booked[WorkerId(second.worker_id)] == 0
        for worker in (first, second):
            (submit,) = worker.submits
            assert submit.holder is not None
            assert (submit.holder.worker_id, submit.holder.epoch) == ("holder", holder.epoch)
            assert submit.holder.endpoint == holder.entry.request_endpoint
            assert submit.holder.token_count == 20 * size
    await wait_for(lambda: stack.is_at_rest)
    page = await stack.record(stream.response.headers["x-request-id"])
    assert [route["pull"]["holder"] for route in page["routes"]] == ["holder", "holder"]


async def test_a_worker_that_gave_requests_up_unread_says_so(stack: Stack) -> None:
    """As it does when the frontend stood still for a minute: the request begins anew from what arrived, there or elsewhere."""
    worker = await stack.add("a")
    worker.behaviour.failure = WireFailure("connection_lost", "its answers were not read", True)
    worker.behaviour.fails_after = 7
    slow(worker)
    async with open_stream(stack) as stream:
        await stream.read(5)
        worker.behaviour.fails_after = None
        await stream.read()
    assert stream.ids == told(stack.story)
    assert stream.finish == "length"
