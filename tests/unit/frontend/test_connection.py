"""What goes over the socket, byte for byte where it matters."""

from __future__ import annotations

import asyncio
import re
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from polyphase.frontend.assembly import Assembler, Piece
from polyphase.frontend.inbox import Arrival
from polyphase.frontend.server import FrontendProtocol

from .stack import Stack

GOLDEN = Path(__file__).parent / "golden"
USER = {"role": "user", "content": "tell"}

STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [USER], "max_tokens": 4}),
    "chat_usage_logprobs": (
        "/v1/chat/completions",
        {
            "messages": [USER],
            "max_tokens": 2,
            "logprobs": True,
            "top_logprobs": 1,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        },
    ),
    "chat_stop": ("/v1/chat/completions", {"messages": [USER], "max_tokens": 9, "stop": ["quick"]}),
    "completion": ("/v1/completions", {"prompt": "so: ", "max_tokens": 3, "echo": True}),
    "completion_usage_logprobs": (
        "/v1/completions",
        {"prompt": [5, 6], "max_tokens": 2, "logprobs": 1, "stream_options": {"include_usage": True}, "return_token_ids": True},
    ),
}


def compare(name: str, data: str) -> None:
    """With the golden file; ids and times are blanked. To renew one, delete it and run the test twice."""
    shown = re.sub(r'"created":\d+', '"created":0', re.sub(r'"(chatcmpl|cmpl)-[0-9a-f]+"', r'"\1-ID"', data))
    path = GOLDEN / name
    if not path.exists():
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(shown)
        pytest.fail(f"{path} was missing and has been written; look at it and run the test again")
    assert shown == path.read_text()


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> asyncio.Semaphore:
    """A gate for the fake worker: the next token is made when the last one has been written, so that each is a chunk of its own."""
    gate = asyncio.Semaphore(1)
    feed = Assembler.feed

    def noted(self: Assembler, arrival: Arrival) -> Piece:
        gate.release()
        return feed(self, arrival)

    monkeypatch.setattr(Assembler, "feed", noted)
    return gate


@pytest.mark.parametrize("name", list(STREAMS))
async def test_streams(stack: Stack, one_at_a_time: asyncio.Semaphore, name: str) -> None:
    worker = await stack.add("worker-0")
    worker.behaviour.gate = one_at_a_time
    path, fields = STREAMS[name]
    answer = await stack.post(path, {"model": "tiny", "stream": True, **fields})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    compare(f"{name}.sse", answer.text)


WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    **STREAMS,
    "chat_two_choices": ("/v1/chat/completions", {"messages": [USER], "n": 2, "max_tokens": 3}),
    "completion_two_prompts": ("/v1/completions", {"prompt": [[5], [6, 7]], "max_tokens": 3}),
}


@pytest.mark.parametrize("name", list(WHOLE))
async def test_whole_answers(stack: Stack, name: str) -> None:
    worker = await stack.add("worker-0")
    worker.behaviour.checks_stop_strings = True
    path, fields = WHOLE[name]
    fields = {key: value for key, value in fields.items() if key != "stream_options"}
    answer = await stack.post(path, {"model": "tiny", **fields})
    compare(f"{name}.json", answer.text + "\n")


ERRORS: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "error_field": ("POST", "/v1/completions", {"model": "tiny", "prompt": "x", "temperature": 7}),
    "error_unknown_field": ("POST", "/v1/completions", {"model": "tiny", "prompt": "x", "max_token": 7}),
    "error_unsupported": ("POST", "/v1/chat/completions", {"model": "tiny", "messages": [USER], "tools": [{}]}),
    "error_type": ("POST", "/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": 5}]}),
    "error_model": ("POST", "/v1/completions", {"model": "none", "prompt": "x"}),
    "error_context": ("POST", "/v1/completions", {"model": "tiny", "prompt": [5] * 600}),
    "error_path": ("GET", "/v2", None),
    "error_method": ("DELETE", "/v1/completions", None),
}


@pytest.mark.parametrize("name", list(ERRORS))
async def test_errors(stack: Stack, name: str) -> None:
    await stack.add("worker-0")
    method, path, body = ERRORS[name]
    async with httpx.AsyncClient() as client:
        answer = await client.request(method, f"{stack.url}{path}", json=body)
    compare(f"{name}.json", f"{answer.status_code}\n{answer.text}\n")


async def test_an_error_ends_a_stream(stack: Stack, one_at_a_time: asyncio.Semaphore) -> None:
    worker = await stack.add("worker-0")
    worker.behaviour.gate = one_at_a_time
    worker.behaviour.fails_after = 2
    answer = await stack.post("/v1/completions", {"model": "tiny", "prompt": "x", "stream": True})
    compare("error_in_stream.sse", answer.text)


async def test_accepted_sockets_do_not_delay(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nagle's algorithm and delayed acknowledgements together would hold a short answer on a kept connection back for 40 ms."""
    await stack.add("worker-0")
    seen: list[int] = []
    made = FrontendProtocol.connection_made

    def noted(self: FrontendProtocol, transport: asyncio.Transport) -> None:
        made(self, transport)
        seen.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(FrontendProtocol, "connection_made", noted)
    async with httpx.AsyncClient() as client:
        for _ in range(3):
            body = {"model": "tiny", "prompt": "x", "max_tokens": 1, "stream": True}
            assert (await client.post(f"{stack.url}/v1/completions", json=body)).status_code == 200
    assert len(seen) == 1, "one connection was used for all"
    assert seen[0] != 0


async def test_a_slow_reader_gets_everything_in_few_writes(stack: Stack, story: list[int]) -> None:
    worker = await stack.add("worker-0")
    worker.behaviour.tokens_per_step = 7
    answer = await stack.post(
        "/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 400, "stream": True, "return_token_ids": True}
    )
    assert answer.text.count('"finish_reason":"length"') == 1
    ids = [int(i) for group in re.findall(r'"token_ids":\[([\d,]*)\]', answer.text) for i in group.split(",") if i]
    assert ids[: len(story)] == story
    assert answer.text.endswith("data: [DONE]\n\n")


async def test_metrics_page(stack: Stack) -> None:
    await stack.add("worker-0")
    await stack.post("/v1/completions", {"model": "tiny", "prompt": "x y z", "max_tokens": 5})
    answer = await stack.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    for line in (
        'polyphase_frontend_requests_total{endpoint="completions",model="tiny",status="finished"} 1.0',
        'polyphase_frontend_active_requests{model="tiny"} 0.0',
        'polyphase_frontend_time_to_first_token_seconds_count{model="tiny"} 1.0',
        'polyphase_frontend_inter_token_latency_seconds_count{model="tiny"} 4.0',
        'polyphase_frontend_output_sequence_tokens_sum{model="tiny"} 5.0',
        'polyphase_frontend_worker_active_decode_blocks{model="tiny",role="both",worker="worker-0"} 0.0',
        'polyphase_router_routes_total{kind="whole",model="tiny"} 1.0',
    ):
        assert line in answer.text, line


async def test_health_shows_the_workers(stack: Stack) -> None:
    from polyphase.wire.events import Load

    worker = await stack.add("worker-0")
    load = Load(step=3, running_count=2, waiting_count=1, block_count=256, used_block_count=9)

    async def shown() -> dict[str, Any]:
        worker.publish(load=load)
        page: dict[str, Any] = (await stack.get("/health")).json()
        return page

    for _ in range(1000):
        page = await shown()
        view = page["models"]["tiny"]["workers"]["worker-0"]
        if view["running"]:
            break
        await asyncio.sleep(0.02)
    assert page["status"] == "healthy"
    assert (view["running"], view["waiting"], view["used_block_count"], view["block_count"], view["step"]) == (2, 1, 9, 256, 3)
    assert view["epoch"] == worker.epoch
