"""`polyphase chat`: a conversation in the terminal, over the HTTP API like any other client's."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape

from polyphase.core.errors import ConfigurationError, PolyphaseError
from polyphase.launch import find_deployment

CONNECT_TIMEOUT_S = 5.0
HELP = "/reset forgets the conversation, /quit or Ctrl-D ends, Ctrl-C stops a reply"


class ChatFailed(PolyphaseError):
    """The server refused a request or broke a reply off; the message is the server's."""

    code = "chat_failed"
    stage = "client"


@dataclass(frozen=True, slots=True)
class ChatSettings:
    model: str | None = None
    temperature: float | None = None
    max_tokens: int = 512
    system: str | None = None


class Conversation:
    """The messages so far, and how the next reply is asked for."""

    def __init__(self, client: httpx.Client, model: str, settings: ChatSettings) -> None:
        self._client = client
        self._model = model
        self._settings = settings
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self._settings.system}] if self._settings.system else []

    def ask(self, text: str) -> Generator[str, None, None]:
        """The reply, piece by piece. What was received is kept as the reply, also if the caller stops in the middle.

        Raises: ChatFailed; the question is then taken back.
        """
        self.messages.append({"role": "user", "content": text})
        reply = ""
        try:
            for piece in self._stream():
                reply += piece
                yield piece
        except ChatFailed:
            self.messages.pop()
            raise
        except (GeneratorExit, KeyboardInterrupt):
            self.messages.append({"role": "assistant", "content": reply})
            raise
        self.messages.append({"role": "assistant", "content": reply})

    def _stream(self) -> Iterator[str]:
        body: dict[str, Any] = {"model": self._model, "messages": self.messages, "stream": True, "max_tokens": self._settings.max_tokens}
        if self._settings.temperature is not None:
            body["temperature"] = self._settings.temperature
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise ChatFailed(_message_of(answer))
                for line in answer.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield from _pieces(json.loads(line[6:]))
        except httpx.HTTPError as error:
            raise ChatFailed(f"the connection to {self._client.base_url} broke off: {error or type(error).__name__}") from None
        except json.JSONDecodeError as error:
            raise ChatFailed(f"the server sent what is not JSON: {error}") from None


def chat_in_terminal(url: str | None, name: str | None, settings: ChatSettings) -> None:
    """Raises: ConfigurationError if there is no server."""
    console = Console(highlight=False)
    base_url = url.rstrip("/").removesuffix("/v1") if url else find_deployment(name, os.environ).url
    with httpx.Client(base_url=base_url, timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S), trust_env=url is not None) as client:
        model = settings.model or first_model(client)
        console.print(f"[bold]{escape(model)}[/] at {escape(base_url)}\n[dim]{HELP}[/]")
        _loop(console, Conversation(client, model, settings))


def first_model(client: httpx.Client) -> str:
    """Raises: ConfigurationError if there is no such server, or it serves nothing."""
    try:
        answer = client.get("/v1/models", timeout=CONNECT_TIMEOUT_S)
        names = [model["id"] for model in answer.raise_for_status().json()["data"]]
    except httpx.HTTPStatusError as error:
        raise ConfigurationError(f"{client.base_url} answers /v1/models with status {error.response.status_code}") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigurationError(
            f"nothing answers at {client.base_url} ({error or type(error).__name__}); start a server with: polyphase serve demo"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ConfigurationError(f"{client.base_url} does not speak OpenAI's API: /v1/models is not a list of models") from None
    if not names:
        raise ConfigurationError(f"{client.base_url} serves no model at the moment; see: polyphase status")
    return str(names[0])


def _loop(console: Console, conversation: Conversation) -> None:
    _enable_line_editing()
    while True:
        try:
            text = console.input("[bold green]you[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text in ("/quit", "/exit"):
            return
        if text == "/reset":
            conversation.reset()
            console.print("[dim]forgotten[/]")
        elif text.startswith("/"):
            console.print(f"[dim]{HELP}[/]")
        elif text:
            _print_reply(console, conversation, text)


def _print_reply(console: Console, conversation: Conversation, text: str) -> None:
    console.print("[bold cyan]model[/] ", end="")
    pieces = conversation.ask(text)
    try:
        for piece in pieces:
            console.print(piece, end="", markup=False, soft_wrap=True)
        console.print()
    except KeyboardInterrupt:
        pieces.close()
        console.print(" [dim](stopped)[/]")
    except ChatFailed as error:
        console.print(error.message, style="red", markup=False, soft_wrap=True)


def _pieces(chunk: Any) -> Iterator[str]:
    if "error" in chunk:
        raise ChatFailed(str(chunk["error"].get("message", chunk["error"])))
    for choice in chunk.get("choices", []):
        if piece := choice.get("delta", {}).get("content"):
            yield piece


def _message_of(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered with status {answer.status_code}"


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401  # input() then has a history
    except ImportError:
        pass
