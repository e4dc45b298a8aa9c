"""A small OpenAI-compatible server over real sockets, strict about what it takes: unknown fields, a wrong model or key are refused.

Written from OpenAI's API reference (chat completions, completions, embeddings, audio transcriptions, models) and, for what others add,
vLLM's (`return_token_ids`, rerank). It answers with a fixed story, one word per chunk, and can be told to misbehave.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

MODEL = "acme/large-1"
VOCABULARY = 1000
WORDS = ["Once", " upon", " a", " time", ",", " there", " was", " a", " server", "."]
_COMMON = {
    "model", "stream", "stream_options", "max_tokens", "temperature", "top_p", "seed", "stop", "n", "user", "presence_penalty",
    "frequency_penalty", "logit_bias", "prompt_cache_key", "logprobs",
}  # fmt: skip
FIELDS = {
    "/v1/chat/completions": _COMMON | {"messages", "tools", "tool_choice", "response_format", "max_completion_tokens", "top_logprobs"},
    "/v1/completions": _COMMON | {"prompt", "echo", "suffix", "best_of"},
    "/v1/embeddings": {"model", "input", "encoding_format", "dimensions", "user"},
    "/v1/rerank": {"model", "query", "documents", "top_n"},
}
TOKEN_FIELDS = {"return_token_ids", "return_tokens_as_token_ids", "ignore_eos", "stop_token_ids"}


@dataclass
class Manner:
    """Changed by tests at any time."""

    key: str | None = None
    takes_images: bool = True
    takes_ids: bool = False  # token ids as prompt, and ids in the answer
    has_rerank: bool = True
    fails: tuple[int, dict[str, str], str] | None = None  # status, headers and body for every POST
    cut_after: int | None = None  # words of a stream; then the connection is reset
    ends_after: int | None = None  # words of a stream; then it ends as if it were whole
    holds_after: int | None = None  # words of a stream; then nothing comes
    pause_s: float = 0.0  # between words
    big_events: int = 0  # that many chunks of 16 KiB in place of words
    embedding_size: int = 4


@dataclass
class Seen:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def fields(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


@dataclass
class OpenAIServer:
    manner: Manner = field(default_factory=Manner)
    seen: list[Seen] = field(default_factory=list)  # of POSTs
    closed_by_client: int = 0  # in the middle of an answer
    sent_bytes: int = 0
    open_count: int = 0  # answers under way
    prompts: list[list[int]] = field(default_factory=list)  # of token ids
    port: int = 0
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=1 << 26)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """As kill -9: connections are reset, and nobody listens any more."""
        if self._server is not None:
            self._server.close()
            for writer in list(self._writers):
                writer.transport.abort()
            self._server = None
            await asyncio.sleep(0)

    def asked(self, path: str) -> list[Seen]:
        return [one for one in self.seen if one.path == path]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                    method, path, _ = head.split(" ", 2)
                    headers = dict(re.findall(r"(?m)^([^:\r\n]+): ?(.*)\r$", head.partition("\n")[2].lower().replace("\r\n\r\n", "\r\n")))
                    headers_as_sent = dict(re.findall(r"(?m)^([^:\r\n]+): ?(.*)\r$", head.partition("\n")[2]))
                    cased = {name.lower(): value for name, value in headers_as_sent.items()}
                    body = await reader.readexactly(int(headers.get("content-length", "0")))
                    await self._answer(reader, writer, method, path, cased, body)
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> None:
        if self.manner.key is not None and headers.get("authorization") != f"Bearer {self.manner.key}":
            _write(writer, 401, _error(f"Incorrect API key provided: {headers.get('authorization', '')[7:]}", "invalid_api_key"))
            return
        if method == "GET":
            page = {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "acme"}]}
            _write(writer, 200, json.dumps(page)) if path == "/v1/models" else _write(writer, 404, "not here")
            return
        self.seen.append(Seen(path, headers, body))
        if self.manner.fails is not None:
            status, more, text = self.manner.fails
            _write(writer, status, text, more)
        elif path == "/v1/audio/transcriptions":
            self._transcribe(writer, headers, body)
        elif path not in FIELDS or (path == "/v1/rerank" and not self.manner.has_rerank):
            _write(writer, 404, _error(f"Invalid URL (POST {path})", None))
        else:
            await self._answer_json(reader, writer, path, json.loads(body))

    async def _answer_json(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, asked: dict[str, Any]) -> None:
        known = FIELDS[path] | (TOKEN_FIELDS if self.manner.takes_ids and path == "/v1/completions" else set())
        if unknown := sorted(asked.keys() - known):
            _write(writer, 400, _error(f"Unrecognized request argument supplied: {', '.join(unknown)}", None))
        elif asked.get("model") != MODEL:
            _write(writer, 404, _error(f"The model `{asked.get('model')}` does not exist", "model_not_found"))
        elif asked.get("n", 1) > 4:
            _write(writer, 400, _error("n must be at most 4", "invalid_n"))
        elif path == "/v1/embeddings":
            texts = asked["input"] if isinstance(asked["input"], list) else [asked["input"]]
            data = [{"object": "embedding", "index": at, "embedding": [0.25] * self.manner.embedding_size} for at in range(len(texts))]
            _write(
                writer, 200, json.dumps({"object": "list", "data": data, "model": MODEL, "usage": {"prompt_tokens": 3, "total_tokens": 3}})
            )
        elif path == "/v1/rerank":
            found = [{"index": at, "relevance_score": 1.0 - at / 10} for at in range(len(asked["documents"]))]
            _write(writer, 200, json.dumps({"id": "rerank-1", "model": MODEL, "results": found}))
        else:
            await self._generate(reader, writer, path, asked)

    async def _generate(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, asked: dict[str, Any]) -> None:
        is_chat, prompt = path == "/v1/chat/completions", asked.get("prompt")
        images = _images(asked) if is_chat else 0
        if images and not self.manner.takes_images:
            _write(writer, 400, _error("image input is not supported", None))
            return
        if isinstance(prompt, list) and not self.manner.takes_ids:
            _write(writer, 400, _error("prompt must be a string", None))
            return
        count = min(asked.get("max_tokens") or len(WORDS), len(WORDS) if not isinstance(prompt, list) else 64)
        usage = {"prompt_tokens": 10 + 500 * images, "completion_tokens": count, "total_tokens": 10 + 500 * images + count}
        if isinstance(prompt, list):
            if min(prompt) < 0 or max(prompt) >= VOCABULARY:
                _write(writer, 400, _error("a token id is out of range", None))
                return
            cached = max(_common(prompt[:-1], earlier) for earlier in [[], *self.prompts])
            self.prompts.append(prompt)
            usage |= {"prompt_tokens": len(prompt), "prompt_tokens_details": {"cached_tokens": cached}}
        kind = "chat.completion" if is_chat else "text_completion"
        base = {"id": "cmpl-7", "object": kind + (".chunk" if is_chat and asked.get("stream") else ""), "created": 1, "model": MODEL}
        if not asked.get("stream"):
            text = "".join(WORDS[:count])
            choice = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
            whole = {**base, "choices": [{"index": 0, **choice, "finish_reason": "length", "logprobs": None}], "usage": usage}
            await asyncio.sleep(self.manner.pause_s)
            _write(writer, 200, json.dumps(whole))
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n")
        self.open_count += 1
        try:
            for at in range(self.manner.big_events or count):
                if at == self.manner.cut_after:
                    await writer.drain()
                    writer.transport.abort()
                    raise ConnectionError
                if at == self.manner.ends_after:
                    writer.write(b"0\r\n\r\n")
                    return
                if at == self.manner.holds_after:
                    await reader.read()
                    raise ConnectionError
                last = at == (self.manner.big_events or count) - 1
                await self._send(writer, {**base, "choices": [self._choice(asked, is_chat, at, "length" if last else None)]})
                if self.manner.pause_s:
                    await asyncio.sleep(self.manner.pause_s)
                if reader.at_eof():
                    raise ConnectionError
            if (asked.get("stream_options") or {}).get("include_usage"):
                await self._send(writer, {**base, "choices": [], "usage": usage})
            writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        except ConnectionError:
            self.closed_by_client += reader.at_eof()
            raise
        finally:
            self.open_count -= 1

    def _choice(self, asked: dict[str, Any], is_chat: bool, at: int, finish: str | None) -> dict[str, Any]:
        word = "x" * 16_000 if self.manner.big_events else WORDS[at % len(WORDS)]
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        choice |= {"delta": {"content": word}} if is_chat else {"text": word}
        if asked.get("return_token_ids") and self.manner.takes_ids:
            token_id = token_at(len(asked["prompt"]) + at)
            choice["token_ids"] = [token_id]
            if (top := asked.get("logprobs")) is not None:
                names = [f"token_id:{(token_id + more) % VOCABULARY}" for more in range(max(top, 1))]
                best = {name: -0.5 - more for more, name in enumerate(names)}
                choice["logprobs"] = {"tokens": names[:1], "token_logprobs": [-0.5], "top_logprobs": [best], "text_offset": [0]}
        return choice

    async def _send(self, writer: asyncio.StreamWriter, chunk: dict[str, Any]) -> None:
        event = b"data: " + json.dumps(chunk).encode() + b"\n\n"
        writer.write(b"%x\r\n%s\r\n" % (len(event), event))
        await writer.drain()
        self.sent_bytes += len(event)

    def _transcribe(self, writer: asyncio.StreamWriter, headers: dict[str, str], body: bytes) -> None:
        boundary = re.search(r"boundary=([^;\s]+)", headers["content-type"])
        assert boundary is not None
        parts = body.split(b"--" + boundary[1].strip('"').encode())
        named = {found[1]: part.partition(b"\r\n\r\n")[2][:-2] for part in parts if (found := re.search(rb' name="([^"]+)"', part))}
        if named.get(b"model") != MODEL.encode() or not named.get(b"file", b"").startswith(b"RIFF"):
            _write(writer, 400, _error(f"no sound, or another model: {named.get(b'model')!r}", None))
        else:
            _write(writer, 200, json.dumps({"text": f"{len(named[b'file'])} bytes of sound"}))


def token_at(position: int) -> int:
    """Of prompt and answer together, so that an answer goes on wherever it is taken up."""
    return 100 + 7 * position % 800


def _common(some: list[int], others: list[int]) -> int:
    return next((at for at, (one, other) in enumerate(zip(some, others, strict=False)) if one != other), min(len(some), len(others)))


def _images(asked: dict[str, Any]) -> int:
    contents = [message["content"] for message in asked["messages"] if isinstance(message["content"], list)]
    urls = [part["image_url"]["url"] for content in contents for part in content if part["type"] == "image_url"]
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    return len(urls)


def _error(message: str, code: str | None) -> str:
    return json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}})


def _write(writer: asyncio.StreamWriter, status: int, text: str, more: dict[str, str] | None = None) -> None:
    kind = "application/json" if text.startswith(("{", "[")) else "text/plain"
    lines = [f"HTTP/1.1 {status} X", f"content-type: {kind}", f"content-length: {len(text.encode())}"]
    lines += [f"{name}: {value}" for name, value in (more or {}).items()]
    writer.write(("\r\n".join(lines) + "\r\n\r\n" + text).encode())


@asynccontextmanager
async def serving(manner: Manner | None = None) -> AsyncIterator[OpenAIServer]:
    server = OpenAIServer(manner or Manner())
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
