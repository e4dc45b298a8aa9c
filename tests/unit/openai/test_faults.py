"""Servers that die, refuse, hang, and want a key; and which of several is asked."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import AsyncExitStack

import openai
import pytest

from polyphase.core.errors import ConfigurationError, ModelLoadError, Overloaded
from polyphase.engines.openai.assembly import key_of
from polyphase.engines.openai.settings import OpenAISettings
from polyphase.engines.served.access import Access, ApiKey, checked_base
from polyphase.engines.served.gate import FAILURES, MAX_WAIT_S, Gate, retry_after_s
from tests.unit.frontend.stack import wait_for
from tests.unit.openai.server import MODEL, Manner, OpenAIServer
from tests.unit.openai.server import serving as serving_server
from tests.unit.openai.stack import Served, load, serving

KEY = "sk-very-secret-0123456789"
HELLO = [{"role": "user", "content": "hello"}]
BODY = {"model": "large", "messages": HELLO, "max_tokens": 10}


async def servers(stack: AsyncExitStack, count: int = 2) -> list[OpenAIServer]:
    return [await stack.enter_async_context(serving_server()) for _ in range(count)]


def asked(some: list[OpenAIServer]) -> list[int]:
    return [len(server.asked("/v1/chat/completions")) for server in some]


def is_out(served: Served, worker_id: str) -> bool:
    return any(view.facts.worker_id == worker_id and view.facts.is_stalled for view in served.frontend.router.workers())


async def test_a_conversation_stays_where_its_beginning_is() -> None:
    async with AsyncExitStack() as stack:
        some = await servers(stack)
        served = await stack.enter_async_context(serving(None, *some))
        homes = []
        for topic in ("a" * 3000, "b" * 3000, "c" * 3000, "d" * 3000):
            messages = [{"role": "user", "content": topic}]
            before = asked(some)
            for turn in range(4):
                await served.post("/v1/chat/completions", {**BODY, "messages": messages})
                messages += [{"role": "assistant", "content": f"answer {turn}"}, {"role": "user", "content": f"question {turn}"}]
            homes.append([now - then for now, then in zip(asked(some), before, strict=True)])
        assert sorted(homes[0]) == [0, 4]
        assert all(sorted(home) == [0, 4] for home in homes), homes
        assert len({tuple(home) for home in homes}) == 2, "and different ones are spread"


async def test_before_the_first_byte_another_server_is_asked() -> None:
    async with AsyncExitStack() as stack:
        some = await servers(stack)
        served = await stack.enter_async_context(serving(None, *some))
        some[0].manner.fails = (500, {}, "broken")
        some[1].manner.fails = (500, {}, '{"error":{"message":"out of memory","type":"server_error"}}')
        answer = await served.post("/v1/chat/completions", BODY)
        assert answer.status_code == 500
        assert sorted(asked(some)) == [1, 1], "each once"
        some[1].manner.fails = None
        for stream in (True, False):
            answer = await served.post("/v1/chat/completions", {**BODY, "stream": stream})
            assert answer.status_code == 200
            assert "server" in answer.text
        some[0].manner.fails, some[0].manner.cut_after = None, 0
        some[1].manner.fails = (500, {}, "broken")
        answer = await served.post("/v1/chat/completions", {**BODY, "stream": True})
        assert answer.status_code == 500, "status and headers alone are nothing that a client has seen"


async def test_a_killed_server_is_left_alone_until_it_is_back() -> None:
    async with AsyncExitStack() as stack:
        some = await servers(stack)
        served = await stack.enter_async_context(serving(None, *some))
        await some[0].stop()
        for _ in range(4):
            assert (await served.post("/v1/chat/completions", BODY)).status_code == 200
        await wait_for(lambda: is_out(served, "w0"))
        await some[1].stop()
        await wait_for(lambda: is_out(served, "w1"))
        answer = await served.post("/v1/chat/completions", BODY)
        assert answer.status_code == 503
        assert "stands still" in answer.json()["error"]["message"]
        await some[0].start()
        await wait_for(lambda: not is_out(served, "w0"))
        assert (await served.post("/v1/chat/completions", BODY)).status_code == 200


async def test_kill_9_in_the_middle_of_a_stream_is_said() -> None:
    async with AsyncExitStack() as stack:
        some = await servers(stack)
        served = await stack.enter_async_context(serving(None, *some))
        for server in some:
            server.manner.holds_after = 3
        stream = await served.client().chat.completions.create(model="large", messages=HELLO, stream=True)  # type: ignore[arg-type]
        words = [(await anext(stream)).choices[0].delta.content for _ in range(3)]
        assert words == ["Once", " upon", " a"]
        (busy,) = (server for server in some if server.open_count)
        await busy.stop()
        with pytest.raises(openai.APIError, match="the connection to openai broke"):
            async for _ in stream:
                pass
        await wait_for(lambda: served.frontend.is_at_rest)


async def test_who_has_answered_is_not_moved_though_its_server_is_quarantined() -> None:
    """Another one could not go on with it."""
    async with AsyncExitStack() as stack:
        some = await servers(stack)
        served = await stack.enter_async_context(serving(None, *some))
        for server in some:
            server.manner.pause_s = 0.1
        stream = await served.client().chat.completions.create(
            model="large",
            messages=HELLO,
            stream=True,
            max_tokens=10,  # type: ignore[arg-type]
        )
        await anext(stream)
        (at,) = (at for at, server in enumerate(some) if server.open_count)
        gate = served.workers[f"w{at}"].engine._gate
        assert gate is not None
        gate.close("for a test", 1e12)
        served.workers[f"w{at}"].engine.note_alive()
        await wait_for(lambda: is_out(served, f"w{at}"))
        rest = [chunk async for chunk in stream]
        assert rest[-1].choices[0].finish_reason == "length"


async def test_retry_after_is_respected() -> None:
    async with AsyncExitStack() as stack:
        some = await servers(stack)
        served = await stack.enter_async_context(serving(None, *some))
        some[0].manner.fails = (429, {"retry-after": "30"}, '{"error":{"message":"slow down"}}')
        for _ in range(6):
            assert (await served.post("/v1/chat/completions", BODY)).status_code == 200
        assert asked(some)[0] <= 1, "once, and then not for 30 s"
        assert asked(some)[1] == 6
        assert not is_out(served, "w0"), "it is only full"


async def test_when_all_are_full_it_waits_and_then_429() -> None:
    async with serving_server() as server, serving(None, server) as served:
        server.manner.fails = (429, {"retry-after": "60"}, '{"error":{"message":"slow down"}}')
        answer = await served.frontend.post("/v1/chat/completions", BODY, headers={"x-stainless-read-timeout": "1"})
        assert answer.status_code == 429
        assert answer.headers["retry-after"]
        assert len(server.seen) == 1


async def test_a_deadline_ends_it_at_the_server_too() -> None:
    async with serving_server(Manner()) as server, serving(None, server) as served:
        server.manner.holds_after = 2
        answer = await served.frontend.post("/v1/chat/completions", {**BODY, "stream": True}, headers={"x-polyphase-deadline-ms": "700"})
        assert "deadline_exceeded" in answer.text
        assert answer.text.strip().endswith("data: [DONE]")
        await wait_for(lambda: server.open_count == 0)


async def test_a_request_that_has_no_answer_yet_is_handed_back_by_a_draining_worker() -> None:
    async with AsyncExitStack() as stack:
        some = await servers(stack)
        served = await stack.enter_async_context(serving(None, *some))
        for server in some:
            server.manner.pause_s = 20.0
        task = asyncio.create_task(served.post("/v1/chat/completions", BODY))
        await wait_for(lambda: sum(asked(some)) == 1)
        at = asked(some).index(1)
        some[1 - at].manner.pause_s = 0.0
        served.workers[f"w{at}"].host.drain()
        assert (await task).status_code == 200
        assert asked(some) == [1, 1]
        assert (await served.latest_record())["moves"] == 1


async def test_the_key_is_sent_and_shows_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    settings = {"key_variable": "A_KEY", "environment": {"A_KEY": f" {KEY}\n"}}
    async with serving_server(Manner(key=KEY)) as server, serving(None, server, **settings) as served:
        assert (await served.post("/v1/chat/completions", BODY)).status_code == 200
        assert server.seen[0].headers["authorization"] == f"Bearer {KEY}"
        server.manner.fails = (400, {}, json.dumps({"error": {"message": f"your key {KEY} is odd", "type": "x"}}))
        answer = await served.post("/v1/chat/completions", BODY)
        assert answer.json()["error"]["message"] == "your key [api key] is odd"
        server.manner.fails = (500, {}, f"debug page with {KEY}")
        answer = await served.post("/v1/chat/completions", BODY)
        server.manner.fails, server.manner.key = None, "another"  # it says the wrong key in its error
        refused = await served.post("/v1/chat/completions", BODY)
        assert refused.status_code == 500
        assert "refused this deployment's API key" in refused.json()["error"]["message"]
        everything = f"{answer.text}{refused.text}{caplog.text}{await served.latest_record()}{served.workers['w0'].engine.__dict__}"
        assert KEY not in everything


async def test_a_wrong_key_is_explained_without_showing_it() -> None:
    async with serving_server(Manner(key="right")) as server:
        with pytest.raises(ModelLoadError, match="refuses the API key, or wants one") as raised:
            await load(server, environment={"POLYPHASE_ENGINE_API_KEY": KEY})
    assert KEY not in str(raised.value)


@pytest.mark.parametrize("named", [KEY, "gsk_0123456789", "", "NOT_SET"])
def test_a_key_in_place_of_a_name_is_not_repeated(named: str) -> None:
    with pytest.raises(ConfigurationError, match="names an environment variable") as raised:
        key_of(OpenAISettings("m", None, "http://127.0.0.1", named))
    assert not named or named not in str(raised.value)


def test_a_key_hides() -> None:
    key = ApiKey(KEY)
    assert KEY not in f"{key} {key!r} {[key]}"
    assert key.hide(f"a {KEY} b") == "a [api key] b"
    for odd in ("", "  ", "a\nb", "schlüssel"):
        with pytest.raises(ConfigurationError):
            ApiKey(odd)


def test_addresses() -> None:
    assert checked_base("https://openrouter.ai/api/v1/") == "https://openrouter.ai/api"
    assert checked_base("http://127.0.0.1:8080") == "http://127.0.0.1:8080"
    for odd in ("http://u:secret@host", "https://host/v1?key=secret", "host:80", "ftp://host"):
        with pytest.raises(ConfigurationError) as raised:
            checked_base(odd)
        assert "secret" not in str(raised.value)


async def test_another_model_is_named() -> None:
    async with serving_server() as server:
        with pytest.raises(ModelLoadError, match=f"does not serve 'small', but {MODEL}"):
            await load(server, model="small")


async def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyphase.engines.openai.assembly.ATTACH_TIMEOUT_S", 0.5)
    server = OpenAIServer(port=1)
    with pytest.raises(ModelLoadError, match=r"no server answers at http://127.0.0.1:1"):
        await load(server)


class TestGate:
    def test_it_closes_after_some_failures_in_a_row(self) -> None:
        gate = Gate()
        for _ in range(FAILURES - 1):
            gate.note_failure("bad", 0.0)
        gate.note_success()
        for _ in range(FAILURES - 1):
            gate.note_failure("bad", 0.0)
        gate.refuse_if_closed(0.0)
        gate.note_failure("worse", 0.0)
        with pytest.raises(Overloaded, match="worse"):
            gate.refuse_if_closed(0.0)

    def test_its_time_doubles_until_something_succeeds(self) -> None:
        gate, now_s = Gate(), 0.0
        for least_s in (1.0, 2.0, 4.0):
            gate.close("gone", now_s)
            assert not gate.note_probe(now_s + least_s - 0.01)
            assert gate.note_probe(now_s + least_s)
            assert not gate.outage
            now_s += 100
        gate.note_success()
        gate.close("gone", now_s)
        assert gate.note_probe(now_s + 1.0)

    def test_full_for_as_long_as_was_asked(self) -> None:
        gate = Gate()
        gate.note_full(5.0, 0.0)
        with pytest.raises(Overloaded) as raised:
            gate.refuse_if_closed(1.0)
        assert raised.value.retry_after_s == 4
        gate.refuse_if_closed(5.0)
        gate.note_full(1e9, 5.0)
        gate.refuse_if_closed(5.0 + MAX_WAIT_S)

    def test_retry_after(self) -> None:
        assert [retry_after_s(text) for text in ("7", "0.5", "-1", None, "Wed, 21 Oct 2026 07:28:00 GMT")] == [7.0, 0.5, 0.0, 1.0, 1.0]


def test_proxies_of_the_environment() -> None:
    """They are for servers elsewhere, never for this machine."""
    assert not Access.to("http://127.0.0.1:1", None).uses_proxies
    assert not Access.to("http://localhost:1", None).uses_proxies
    assert Access.to("https://example.org", None).uses_proxies
