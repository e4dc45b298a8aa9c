"""A deployment before two others, which are real OpenAI-compatible servers: as text, as tokens, and after kill -9 of one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest

from polyphase.testing import Deployment

UPSTREAM = "acme/tiny-1"
HELLO = [{"role": "user", "content": "What does os.path.join do? " * 20}]
PROMPT = list(range(300, 400))


@pytest.fixture(scope="module")
def upstreams() -> Iterator[list[Deployment]]:
    """Mock engines at the pace of a real one."""
    options = ("--engine", "mock", "--served-model-name", UPSTREAM, "--mock-speedup", "0.5")
    with ExitStack() as stack:
        yield [stack.enter_context(Deployment("demo", *options, "--name", f"up-{at}")) for at in range(2)]


def in_front(upstreams: list[Deployment], model: str, **environment: str) -> Deployment:
    attach = ",".join(upstream.url for upstream in upstreams)
    return Deployment(model, "--served-model-name", "x", "--engine", "openai", "--attach", attach, environment=environment)


def client_of(served: Deployment) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)


def upstream_of(served: Deployment, upstreams: list[Deployment]) -> Deployment:
    """Behind the worker that served the latest request."""
    latest = httpx.get(f"{served.url}/debug/requests?limit=1", timeout=30).json()["data"][0]
    return upstreams[int(latest["decode_worker"].removeprefix("worker-"))]


def frontend_pid(served: Deployment) -> int:
    return next(pid for pid in served.pids() if b"polyphase.frontend" in Path(f"/proc/{pid}/cmdline").read_bytes())


def answered_by(upstream: Deployment, path: str) -> int:
    text = httpx.get(f"{upstream.url}/metrics", timeout=30).text
    lines = [line for line in text.splitlines() if line.startswith(f'polyphase_frontend_requests_total{{endpoint="{path}"')]
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines))


def test_text_through_two_servers(upstreams: list[Deployment]) -> None:
    with in_front(upstreams, UPSTREAM, POLYPHASE_ENGINE_API_KEY="sk-not-to-be-seen") as served:
        client = client_of(served)
        direct = client_of(upstreams[0])
        fields = {"messages": HELLO, "max_tokens": 12, "temperature": 0}
        whole = client.chat.completions.create(model="x", **fields)  # type: ignore[call-overload]
        told = direct.chat.completions.create(model=UPSTREAM, **fields)  # type: ignore[call-overload]
        assert whole.model == "x"
        assert whole.choices[0].message.content == told.choices[0].message.content
        assert whole.usage.prompt_tokens == told.usage.prompt_tokens
        home = upstream_of(served, upstreams)
        before = answered_by(home, "chat.completions")
        for _ in range(3):
            chunks = list(client.chat.completions.create(model="x", stream=True, **fields))  # type: ignore[call-overload]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
        assert answered_by(home, "chat.completions") == before + 3, "a conversation stays where its beginning is"

        stream = client.chat.completions.create(model="x", messages=HELLO, max_tokens=2000, stream=True, temperature=0)  # type: ignore[call-overload]
        next(stream)
        os.kill(frontend_pid(home), signal.SIGKILL)
        with pytest.raises(openai.APIError, match="the connection to openai broke"):
            for _ in stream:
                pass
        again = client.chat.completions.create(model="x", **fields)  # type: ignore[call-overload]
        assert again.choices[0].message.content == whole.choices[0].message.content
        served.wait_for(lambda: not any(_stalled(served)), "the killed server's next life", 60)
        command_lines = b" ".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in served.pids())
        assert "sk-not-to-be-seen" not in served.output() + served.logs() + command_lines.decode()


def test_tokens_move_to_the_other_server_after_kill_9(upstreams: list[Deployment]) -> None:
    body = {"model": "x", "prompt": PROMPT, "max_tokens": 60, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with in_front(upstreams, "demo") as served:
        assert "tokens in, tokens out" in served.logs()
        whole = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["token_ids"]
        assert len(whole) == 60
        tokens: list[int] = []
        killed_at = 0
        with client_of(served).completions.with_streaming_response.create(
            model="x", prompt=PROMPT, max_tokens=60, temperature=0, stream=True, extra_body={"ignore_eos": True, "return_token_ids": True}
        ) as response:
            for chunk in response.parse():
                tokens += chunk.choices[0].token_ids or []  # type: ignore[attr-defined]
                if len(tokens) >= 5 and not killed_at:
                    killed_at = len(tokens)
                    os.kill(frontend_pid(upstream_of(served, upstreams)), signal.SIGKILL)
        assert len(tokens) == 60
        assert tokens[:killed_at] == whole[:killed_at], "a mock engine says something else to the longer prompt"
        assert httpx.get(f"{served.url}/debug/requests?limit=1", timeout=30).json()["data"][0]["migrations"] == 1


def _stalled(served: Deployment) -> list[bool]:
    return [worker["is_stalled"] for worker in served.health()["models"]["x"]["workers"].values()]
