"""Plays SGLang from recordings, over real sockets: answers what was recorded for a body, and nothing else.

What is not in a recording (another field, another value) is answered with 400, so that a change of what we send is seen. A request id that
begins with `hang-`, `cut-`, `mute-` or `die-` changes how the answer is played: it stops in the middle and the connection stays; the
connection is cut; the stream ends properly but without a finish; the engine breaks the request off. Of a decode server, `lost-` says that
the prefill server died. As the real one, it goes on when a connection closes, and ends a request when it is told to by name.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "recorded"
WHOLE, CUMULATIVE, HALVES = "sglang-0.5.23.json", "sglang-0.5.23-cumulative.json", "sglang-0.5.23-halves.json"
PIECE = 37  # bytes; so that pieces end anywhere
DIED = (
    'data: {"text":"","output_ids":[7],"meta_info":{"id":"x","finish_reason":{"type":"abort","message":"the scheduler gave it up",'
    '"status_code":500,"err_type":null},"prompt_tokens":100,"completion_tokens":1,"cached_tokens":0}}\n\ndata: [DONE]\n\n'
)
UNRECORDED = '{"error":"not recorded"}'
_OF_EACH_TRY = {"rid", "bootstrap_room", "bootstrap_port", "bootstrap_host"}


class Recording:
    def __init__(self, name: str = WHOLE, half: str | None = None) -> None:
        found: dict[str, Any] = json.loads((RECORDED / name).read_text())
        self.version: str = found["version"]
        part = found if half is None else found[half]
        self.pages: dict[str, Any] = part["pages"]
        self.exchanges: list[dict[str, Any]] = part["exchanges"]
        self.batches = [tuple(base64.b64decode(frame) for frame in frames) for frames in part["kv_events"]]

    def exchange(self, name: str) -> dict[str, Any]:
        return next(exchange for exchange in self.exchanges if exchange["name"] == name)

    def answer_to(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The latest one with this body, whatever the request is called: caches are warm then."""
        wanted = _of_every_try(body)
        for exchange in reversed(self.exchanges):
            if exchange["path"] == path and exchange["name"] != "lost" and _of_every_try(exchange["body"]) == wanted:
                return exchange
        return None

    def rest_of_answer_to(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """For a body that is a recorded one but goes on from its first tokens: what was recorded behind them, of incremental streams."""
        for exchange in self.exchanges:
            asked = exchange["body"]
            emitted = body.get("input_ids", [])[len(asked["input_ids"]) :]
            left = asked["sampling_params"]["max_new_tokens"] - len(emitted)
            expected = {
                **asked,
                "input_ids": asked["input_ids"] + emitted,
                "sampling_params": {**asked["sampling_params"], "max_new_tokens": left},
            }
            is_it = emitted and exchange["path"] == path and _of_every_try(expected) == _of_every_try(body)
            if is_it and (rest := _behind(exchange["answer"], emitted)):
                return {**exchange, "answer": rest}
        return None


def _of_every_try(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key not in _OF_EACH_TRY}


def _behind(answer: str, emitted: list[int]) -> str | None:
    """Events of a recorded stream behind these tokens; None if it began otherwise."""
    events = answer.split("\n\n")
    seen: list[int] = []
    for place, event in enumerate(events):
        if seen == emitted:
            return "\n\n".join(events[place:])
        seen += json.loads(event.removeprefix("data: ")).get("output_ids", []) if event.startswith("data: {") else []
    return None


class Rooms:
    """Where the legs of two halves meet: neither is answered before the other has come."""

    def __init__(self) -> None:
        self._present: dict[int, set[str]] = {}
        self._changed = asyncio.Condition()

    async def meet(self, room: int, half: str) -> None:
        async with self._changed:
            self._present.setdefault(room, set()).add(half)
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._present[room] == {"prefill", "decode"})


@dataclass
class SglangDouble:
    recording: Recording
    pause_s: float = 0.0  # before each piece of an answer
    rooms: Rooms | None = None  # of a half
    api_key: str | None = None
    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    unrecorded: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    was_aborted: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def half(self) -> str:
        mode: str = self.recording.pages["/server_info"]["disaggregation_mode"]
        return mode

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                path = head.split(" ", 2)[1].partition("?")[0]
                headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
                headers = {name.lower(): value for name, value in headers.items()}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                if self.api_key is not None and path != "/health" and headers.get("authorization") != f"Bearer {self.api_key}":
                    _write(writer, 401, '{"error":"Unauthorized"}')
                else:
                    await self._answer(reader, writer, path, body)
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, body: bytes) -> None:
        if path in self.recording.pages or path == "/health":
            _write(writer, 200, json.dumps(self.recording.pages.get(path, "")))
        elif path == "/abort_request":
            self.aborted.append(json.loads(body)["rid"])
            self.was_aborted.set()
            _write(writer, 200, "")
        elif path != "/generate":
            _write(writer, 404, '{"detail":"Not Found"}')
        else:
            await self._generate(reader, writer, json.loads(body))

    async def _generate(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: dict[str, Any]) -> None:
        self.bodies.append(asked)
        found = self.recording.answer_to("/generate", asked) or self.recording.rest_of_answer_to("/generate", asked)
        if found is None or (self.rooms is not None) != ("bootstrap_room" in asked):
            self.unrecorded.append(json.dumps(asked))
            _write(writer, 400, UNRECORDED)
            return
        if asked.get("rid", "").startswith("lost-"):
            found = self.recording.exchange("lost")
        elif self.rooms is not None:
            await self.rooms.meet(asked["bootstrap_room"], self.half)
        if not asked.get("stream"):
            _write(writer, found["status"], found["answer"])
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        manner = asked.get("rid", "").partition("-")[0]
        text: str = found["answer"]
        if manner in ("hang", "cut", "mute", "die"):
            text = "".join(f"{event}\n\n" for event in text.split("\n\n")[:3]) + (DIED if manner == "die" else "")
        await self._play(reader, writer, text.encode())
        if manner == "hang":
            await reader.read()
            raise ConnectionError
        if manner == "cut":
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
                raise ConnectionError


def _write(writer: asyncio.StreamWriter, status: int, text: str) -> None:
    data = text.encode()
    writer.write(b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (status, len(data), data))


@asynccontextmanager
async def serving(double: SglangDouble) -> AsyncIterator[SglangDouble]:
    server = await asyncio.start_server(double.serve, "127.0.0.1", 0)
    double.port = server.sockets[0].getsockname()[1]
    try:
        yield double
    finally:
        server.close()
