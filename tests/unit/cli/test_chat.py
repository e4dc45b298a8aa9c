"""`polyphase chat` against a small server that streams what it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from polyphase.cli.chat import ChatFailed, ChatSettings, Conversation
from tests.unit.cli.conftest import CommandLine


class FakeServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: Any = {"data": [{"id": "small"}]}
        self.pieces: list[str] = ["Hel", "lo."]
        self.refusal: tuple[int, Any] | None = None
        self.ends_with: list[Any] = []
        self.bodies: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        self.answer(200, self.server.models)

    def do_POST(self) -> None:
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        if self.server.refusal is not None:
            self.answer(*self.server.refusal)
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for piece in self.server.pieces:
            self.event({"choices": [{"delta": {"content": piece}}]})
        for last in self.server.ends_with:
            self.event(last)
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, body: Any) -> None:
        self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())

    def answer(self, status: int, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def client(server: FakeServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, trust_env=False) as made:
        yield made


def test_a_conversation_in_the_terminal(polyphase: CommandLine, server: FakeServer):
    typed = "Hi\n\nAgain\n/help\n/reset\nAnew\n/quit\n"
    result = polyphase("chat", "--url", f"{server.url}/v1", "--temperature", "0", "--system", "Be brief.", typed=typed)
    assert result.exit_code == 0, result.output
    assert result.output.count("Hello.") == 3
    first, second, third = server.bodies
    assert first["model"] == "small"
    assert first["temperature"] == 0
    assert first["stream"] is True
    assert [message["content"] for message in second["messages"]] == ["Be brief.", "Hi", "Hello.", "Again"]
    assert [message["content"] for message in third["messages"]] == ["Be brief.", "Anew"]


def test_end_of_input_ends(polyphase: CommandLine, server: FakeServer):
    assert polyphase("chat", "--url", server.url, typed="").exit_code == 0


def test_what_the_model_writes_is_not_markup(polyphase: CommandLine, server: FakeServer):
    server.pieces = ["[red]", "x[/red] [/]"]
    result = polyphase("chat", "--url", server.url, typed="Hi\n")
    assert "[red]x[/red] [/]" in result.output


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (400, {"error": {"message": "max_tokens must be positive"}}, "max_tokens must be positive"),
        (503, b"<html>", "the server answered with status 503"),
    ],
)
def test_a_refusal_is_shown_and_the_chat_goes_on(polyphase: CommandLine, server: FakeServer, status: int, body: Any, sentence: str):
    server.refusal = (status, body)
    result = polyphase("chat", "--url", server.url, typed="Hi\nAgain\n")
    assert result.exit_code == 0
    assert result.output.count(sentence) == 2
    assert len(server.bodies[1]["messages"]) == 1


def test_an_error_in_the_stream(client: httpx.Client, server: FakeServer):
    server.ends_with = [{"error": {"message": "the worker died"}}]
    conversation = Conversation(client, "small", ChatSettings())
    with pytest.raises(ChatFailed, match="the worker died"):
        list(conversation.ask("Hi"))
    assert conversation.messages == []


def test_a_reply_stopped_halfway_is_kept_as_far_as_it_came(client: httpx.Client):
    conversation = Conversation(client, "small", ChatSettings())
    reply = conversation.ask("Hi")
    assert next(reply) == "Hel"
    reply.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": "Hel"}


@pytest.mark.parametrize(
    ("models", "sentence"),
    [({"data": []}, "serves no model at the moment"), ([1], "does not speak OpenAI's API"), (b"<html>", "does not speak OpenAI's API")],
)
def test_servers_that_are_no_use(polyphase: CommandLine, server: FakeServer, models: Any, sentence: str):
    server.models = models
    result = polyphase("chat", "--url", server.url)
    assert result.exit_code == 1
    assert sentence in result.stderr


def test_a_server_that_has_gone_away(server: FakeServer, client: httpx.Client):
    conversation = Conversation(client, "small", ChatSettings())
    server.server_close()
    with pytest.raises(ChatFailed, match="broke off"):
        list(conversation.ask("Hi"))
