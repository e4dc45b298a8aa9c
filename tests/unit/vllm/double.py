"""Plays vLLM from recordings, over real sockets: answers what was recorded for a body, and nothing else.

What is not in a recording (another field, another value) is answered with 400, so that a change of what we send is seen. A request id that
begins with `hang-`, `cut-`, `mute-` or `die-` changes how the answer is played: it stops in the middle and the connection stays; the
connection is cut; the stream ends properly but without a finish; the engine reports an error.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

RECORDED = Path(__file__).parent / "recorded"
PIECE = 37  # bytes; so that pieces end anywhere
ERROR = 'data: {"error": {"message": "EngineCore encountered an issue", "type": "InternalServerError", "param": null, "code": 500}}\n\n'


class Recording:
    def __init__(self, name: str = "vllm-0.32.0.json") -> None:
        found: dict[str, Any] = json.loads((RECORDED / name).read_text())
        self.version: str = found["version"]
        self.pages: dict[str, Any] = found["pages"]
        self.exchanges: dict[str, dict[str, Any]] = {exchange["name"]: exchange for exchange in found["exchanges"]}
        self.batches = [tuple(base64.b64decode(frame) for frame in frames) for frames in found["kv_events"]]

    def answer_to(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The latest one with this body, whatever the request is called: caches are warm then."""
        wanted = {key: value for key, value in body.items() if key != "request_id"}
        for exchange in reversed(self.exchanges.values()):
            if exchange["path"] == path and {key: value for key, value in exchange["body"].items() if key != "request_id"} == wanted:
                return exchange
        return None

    def rest_of_answer_to(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """For a body that is a recorded one but goes on from its first tokens: what was recorded behind them."""
        for exchange in self.exchanges.values():
            asked = exchange["body"]
            emitted = body.get("token_ids", [])[len(asked.get("token_ids", [])) :]
            if exchange["path"] != path or not emitted or "sampling_params" not in body:
                continue
            left = asked["sampling_params"]["max_tokens"] - len(emitted)
            expected = {
                **asked,
                "token_ids": asked["token_ids"] + emitted,
                "sampling_params": {**asked["sampling_params"], "max_tokens": left},
            }
            if {**expected, "request_id": ""} == {**body, "request_id": ""} and (rest := _behind(exchange["answer"], emitted)):
                return {**exchange, "answer": rest}
        return None


def _behind(answer: str, emitted: list[int]) -> str | None:
    """Events of a recorded stream behind these tokens; None if it began otherwise."""
    events = answer.split("\n\n")
    seen: list[int] = []
    for place, event in enumerate(events):
        if seen == emitted:
            return "\n\n".join(events[place:])
        choices = json.loads(event.removeprefix("data: ")).get("choices") if event.startswith("data: {") else None
        seen += choices[0]["token_ids"] if choices else []
    return None


class VllmDouble:
    def __init__(self, recording: Recording, *, has_generate: bool = True, pause_s: float = 0.0, api_key: str = "") -> None:
        self.recording = recording
        self.has_generate = has_generate
        self.api_key = api_key  # wanted for what is below /v1, as the real one does
        self.pause_s = pause_s  # before each piece of an answer
        self.port = 0
        self.unrecorded: list[str] = []
        self.closed_by_client = asyncio.Event()  # in the middle of an answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                path = head.split(" ", 2)[1]
                headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                if self.api_key and path.startswith("/v1") and headers.get("authorization") != f"bearer {self.api_key}":
                    _write(writer, 401, '{"error":"Unauthorized"}')
                    continue
                await self._answer(reader, writer, path, headers.get("x-request-id", ""), body)
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, request_id: str, body: bytes) -> None:
        if path in self.recording.pages or path == "/health":
            page = self.recording.pages.get(path, "")
            _write(writer, 200, page if isinstance(page, str) else json.dumps(page))
            return
        if path == "/inference/v1/generate" and not self.has_generate:
            _write(writer, 403, '{"error":{"message":"start with --enable-scale-out","code":403}}')
            return
        if not any(exchange["path"] == path for exchange in self.recording.exchanges.values()):
            _write(writer, 404, '{"error":{"message":"Not Found","code":404}}')
            return
        asked = json.loads(body)
        found = self.recording.answer_to(path, asked) or self.recording.rest_of_answer_to(path, asked)
        if found is None:
            self.unrecorded.append(body.decode())
            _write(writer, 400, '{"error":{"message":"not recorded","code":400}}')
            return
        if found["status"] != 200:
            _write(writer, found["status"], found["answer"])
            return
        if not asked.get("stream"):
            _write(writer, 200, found["answer"])
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        manner = request_id.partition("-")[0]
        text: str = found["answer"]
        if manner in ("hang", "cut", "mute", "die"):
            text = "".join(f"{event}\n\n" for event in text.split("\n\n")[:3]) + (ERROR if manner == "die" else "")
        await self._play(reader, writer, text.encode())
        if manner == "hang":
            await self._until_closed(reader)
        elif manner == "cut":
            writer.transport.abort()
        else:
            writer.write(b"0\r\n\r\n")

    async def _play(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: bytes) -> None:
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            await writer.drain()
            await asyncio.sleep(self.pause_s)
            if reader.at_eof():
                self.closed_by_client.set()
                raise ConnectionError

    async def _until_closed(self, reader: asyncio.StreamReader) -> None:
        await reader.read()
        self.closed_by_client.set()
        raise ConnectionError


def _write(writer: asyncio.StreamWriter, status: int, text: str) -> None:
    data = text.encode()
    writer.write(b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (status, len(data), data))


@asynccontextmanager
async def serving(double: VllmDouble) -> AsyncIterator[VllmDouble]:
    server = await asyncio.start_server(double.serve, "127.0.0.1", 0)
    double.port = server.sockets[0].getsockname()[1]
    try:
        yield double
    finally:
        server.close()


class EventsDouble:
    """The publisher of KV events, and what it keeps of the past. `forgotten` are the oldest batches, which it keeps no more."""

    def __init__(self, folder: Path, batches: list[tuple[bytes, ...]], forgotten: int = 0) -> None:
        self.endpoint, self.replay_endpoint = f"ipc://{folder}/events", f"ipc://{folder}/replay"
        self.batches = batches
        self.forgotten = forgotten
        self.asked: list[int] = []

    async def __aenter__(self) -> EventsDouble:
        self._context = zmq.asyncio.Context()
        self._publisher = self._context.socket(zmq.XPUB)
        self._replayer = self._context.socket(zmq.ROUTER)
        for socket, endpoint in ((self._publisher, self.endpoint), (self._replayer, self.replay_endpoint)):
            socket.linger = 0
            socket.bind(endpoint)
        self._task = asyncio.create_task(self._replay())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})
        self._publisher.close()
        self._replayer.close()
        self._context.term()

    async def subscribed(self) -> None:
        """Somebody listens."""
        await asyncio.wait_for(self._publisher.recv(), 10)

    async def publish(self, batch: tuple[bytes, ...]) -> None:
        await self._publisher.send_multipart(batch)

    async def _replay(self) -> None:
        while True:
            client, _, start = await self._replayer.recv_multipart()
            first = int.from_bytes(start, "big")
            self.asked.append(first)
            for number, batch in enumerate(self.batches):
                if number >= max(first, self.forgotten):
                    await self._replayer.send_multipart([client, b"", *batch])
            await self._replayer.send_multipart([client, b"", b"", b"\xff" * 8, b""])
