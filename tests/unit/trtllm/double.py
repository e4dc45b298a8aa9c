"""A server that speaks what TensorRT-LLM's sources say, and is strict about it: unknown fields are errors, queues are drained by whoever
asks, a generation-only request has to bring what a context-only one left. Its "model" adds tokens that follow from the prompt.

A request whose `user`-less prompt begins with one of `HANG`, `CUT`, `MUTE`, `DIE` is answered wrongly in that way.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import xxhash

VOCAB = 4096
HANG, CUT, MUTE, DIE = 11, 12, 13, 14
_COMPLETION_FIELDS = {
    "model", "prompt", "best_of", "echo", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty",
    "seed", "stop", "stream", "stream_options", "suffix", "temperature", "top_p", "user", "lora_request", "prompt_ignore_length",
    "use_beam_search", "top_k", "top_p_min", "min_p", "repetition_penalty", "length_penalty", "early_stopping", "stop_token_ids",
    "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens", "spaces_between_special_tokens",
    "truncate_prompt_tokens", "return_context_logits", "detokenize", "add_special_tokens", "response_format",
    "disaggregated_params", "priority",
}  # fmt: skip
_DISAGGREGATED_FIELDS = {
    "request_type", "first_gen_tokens", "first_gen_log_probs", "ctx_request_id", "encoded_opaque_state", "draft_tokens",
    "disagg_request_id", "ctx_dp_rank", "ctx_info_endpoint", "schedule_style", "ctx_usage",
}  # fmt: skip
_FORMATS = {"text", "json", "json_schema", "json_object", "regex", "ebnf", "structural_tag"}


def next_token(tokens: Sequence[int], seed: int = 0) -> int:
    return xxhash.xxh3_64_intdigest(json.dumps([seed, *tokens]).encode()) % (VOCAB - 32) + 32


def write_model(folder: Path) -> None:
    """The files beside the weights of a model whose tokens are called t0, t1, …"""
    vocab = {f"t{number}": number for number in range(VOCAB)}
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": []}, "decoder": decoder}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"vocab_size": VOCAB, "eos_token_id": 1, "max_position_embeddings": 4096, "num_hidden_layers": 2, "hidden_size": 64}
    (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4}))


class Contexts(Protocol):
    """Prompts whose KV waits at one of several servers, by opaque state."""

    def put(self, state: str, prompt: list[int]) -> None: ...

    def take(self, state: str) -> list[int] | None: ...


class LocalContexts:
    """Of the servers of this process."""

    def __init__(self) -> None:
        self._prompts: dict[str, list[int]] = {}

    def put(self, state: str, prompt: list[int]) -> None:
        self._prompts[state] = prompt

    def take(self, state: str) -> list[int] | None:
        return self._prompts.pop(state, None)


class TrtllmDouble:
    def __init__(
        self, *, block_size: int = 32, block_count: int = 512, pause_s: float = 0.0, model: str = "tiny", contexts: Contexts | None = None
    ) -> None:
        self.model = model
        self._contexts = contexts or _LOCAL
        self.block_size = block_size
        self.block_count = block_count
        self.pause_s = pause_s  # before each token
        self.port = 0
        self.refused: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.closed_by_client = asyncio.Event()  # in the middle of an answer
        self.kept: dict[str, list[int]] = {}  # by opaque state: prompts that it has computed for a generation server
        self._cached: dict[tuple[int, ...], int] = {}  # prefix -> block hash
        self._events: list[dict[str, Any]] = []
        self._event_count = 0
        self._iterations: list[dict[str, Any]] = []
        self._step = 0
        self._running = 0
        self._tell({"type": "created", "num_blocks_per_cache_level": [block_count, 0]})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # What it keeps

    def _tell(self, data: dict[str, Any]) -> None:
        self._events.append({"event_id": self._event_count, "window_size": 4096, "data": data})
        self._event_count += 1

    def lose_events(self) -> None:
        """As if somebody else had asked."""
        self._events.clear()

    def evict(self, tokens: Sequence[int]) -> None:
        """The last full block of a prompt."""
        key = tuple(tokens[: len(tokens) // self.block_size * self.block_size])
        self._tell({"type": "removed", "block_hashes": [self._cached.pop(key)]})

    def demote(self, tokens: Sequence[int]) -> None:
        key = tuple(tokens[: len(tokens) // self.block_size * self.block_size])
        level = {"type": "event_diff", "old_value": 0, "new_value": 1}
        self._tell({"type": "updated", "block_hash": self._cached[key], "cache_level": level})

    def _compute(self, tokens: list[int]) -> int:
        """Keep full blocks; how many tokens were there."""
        cached, blocks, parent = 0, [], None
        for end in range(self.block_size, len(tokens) + 1, self.block_size):
            key = tuple(tokens[:end])
            if key in self._cached:
                cached, parent = end, self._cached[key]
                continue
            self._cached[key] = xxhash.xxh3_64_intdigest(json.dumps(key).encode()) >> 1
            pieces = [{"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in key[-self.block_size :]]
            blocks.append({"type": "stored_block", "block_hash": self._cached[key], "tokens": pieces, "cache_level": 0, "priority": 35})
        if blocks:
            self._tell({"type": "stored", "parent_hash": parent, "blocks": blocks})
        return min(cached, len(tokens) - 1)

    def _iterate(self) -> None:
        self._step += 1
        kv = {
            "maxNumBlocks": self.block_count,
            "usedNumBlocks": min(len(self._cached), self.block_count),
            "tokensPerBlock": self.block_size,
        }
        self._iterations.append(
            {"iter": self._step, "numActiveRequests": self._running, "numQueuedRequests": 0, "iterLatencyMS": 7.0, "kvCacheStats": kv}
        )

    # HTTP

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, path, _ = head.split(" ", 2)
                headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                await self._answer(reader, writer, method, path, body)
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, path: str, body: bytes) -> None:
        match method, path:
            case "GET", "/health":
                _write(writer, 200, "")
            case "GET", "/version":
                _write(writer, 200, json.dumps({"version": "1.3.0"}))
            case "GET", "/v1/models":
                _write(
                    writer, 200, json.dumps({"object": "list", "data": [{"id": self.model, "object": "model", "owned_by": "tensorrt_llm"}]})
                )
            case "GET", "/metrics":
                taken, self._iterations = self._iterations, []
                _write(writer, 200, json.dumps(taken))
            case "POST", "/kv_cache_events":
                events, self._events = self._events, []
                _write(writer, 200, json.dumps(events))
            case "POST", "/v1/completions":
                await self._complete(reader, writer, json.loads(body))
            case _:
                _write(writer, 404, '{"detail":"Not Found"}')

    async def _complete(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: dict[str, Any]) -> None:
        self.bodies.append(asked)
        wrong = _what_is_wrong(asked)
        if wrong is not None:
            self.refused.append(wrong)
            _write(writer, 400, json.dumps({"object": "error", "message": wrong, "type": "BadRequestError", "code": 400}))
            return
        params = asked.get("disaggregated_params") or {}
        prompt: list[int] = asked["prompt"]
        if params.get("request_type") == "context_only":
            _write(writer, 200, json.dumps(self._context_only(asked, params)))
            return
        if params.get("request_type") == "generation_only":
            state = params["encoded_opaque_state"]
            if self._contexts.take(state) != prompt:
                _write(writer, 500, json.dumps({"object": "error", "message": "no such context", "type": "InternalError", "code": 500}))
                return
        cached = self._compute(prompt)
        if not asked.get("stream"):
            _write(writer, 200, json.dumps(self._whole(asked, cached)))
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        self._running += 1
        try:
            await self._stream(reader, writer, asked, cached)
        finally:
            self._running -= 1
            self._iterate()

    def _whole(self, asked: dict[str, Any], cached: int) -> dict[str, Any]:
        tokens: list[int] = list(asked["prompt"])
        for _ in range(asked["max_tokens"]):
            tokens.append(next_token(tokens, asked.get("seed", 0)))
            self._iterate()
        told = tokens[len(asked["prompt"]) :]
        choice = {"index": 0, "text": "", "token_ids": told, "finish_reason": "length", "stop_reason": None}
        return {"object": "text_completion", "model": "tiny", "choices": [choice], "usage": _usage(asked["prompt"], len(told), cached)}

    def _context_only(self, asked: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
        prompt: list[int] = asked["prompt"]
        cached = self._compute(prompt)
        self._iterate()
        first = next_token(prompt, asked.get("seed", 0))
        ends = first in asked.get("stop_token_ids", [])
        state = base64.b64encode(json.dumps([self.port, len(self.kept), prompt[:3]]).encode()).decode()
        if not ends:
            self.kept[state] = prompt
            self._contexts.put(state, prompt)
        offered = {
            "request_type": "context_only",
            "first_gen_tokens": [first],
            "ctx_request_id": 2048 + len(self.kept),
            "disagg_request_id": params["disagg_request_id"],
            "encoded_opaque_state": state,
            "draft_tokens": None,
        }
        choice = {
            "index": 0,
            "text": "",
            "token_ids": [first],
            "finish_reason": "stop" if ends else "length",
            "stop_reason": first if ends else None,
            "disaggregated_params": offered,
        }
        return {"id": "cmpl-1", "object": "text_completion", "model": "tiny", "choices": [choice], "usage": _usage(prompt, 1, cached)}

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: dict[str, Any], cached: int) -> None:
        tokens: list[int] = list(asked["prompt"])
        count, finish, stop_reason = 0, None, None
        while finish is None:
            token = next_token(tokens, asked.get("seed", 0))
            tokens.append(token)
            count += 1
            self._iterate()
            if count % self.block_size == 0:
                self._compute(tokens[:-1])
            if token in asked.get("stop_token_ids", []):
                finish, stop_reason = "stop", token
            elif count >= asked["max_tokens"]:
                finish = "length"
            choice = {"index": 0, "text": "", "token_ids": [token], "finish_reason": finish, "stop_reason": stop_reason}
            if asked.get("logprobs"):
                top = {f"t{token}": -0.5, f"t{(token + 1) % VOCAB}": -1.5}
                choice["logprobs"] = {
                    "token_logprobs": [-0.5],
                    "tokens": [f"t{token}"],
                    "text_offset": [0],
                    "top_logprobs": [dict(list(top.items())[: asked["logprobs"]])],
                }
            manner = tokens[0] if count == 3 else None
            if manner == DIE:
                _event(writer, {"object": "error", "message": "the executor has ended", "type": "InternalError", "code": 500})
                break
            if manner == MUTE:
                break
            _event(writer, {"id": "cmpl-1", "object": "text_completion", "model": "tiny", "choices": [choice]})
            await writer.drain()
            if manner == CUT:
                writer.transport.abort()
                raise ConnectionError
            await asyncio.sleep(self.pause_s)
            if manner == HANG:
                await reader.read()
            if manner == HANG or reader.at_eof():
                self.closed_by_client.set()
                raise ConnectionError
        if finish is not None and (asked.get("stream_options") or {}).get("include_usage"):
            _event(writer, {"id": "cmpl-1", "object": "text_completion", "choices": [], "usage": _usage(asked["prompt"], count, cached)})
        data = b"data: [DONE]\n\n"
        writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))


_LOCAL = LocalContexts()


def _what_is_wrong(asked: dict[str, Any]) -> str | None:
    if unknown := asked.keys() - _COMPLETION_FIELDS:
        return f"Extra inputs are not permitted: {sorted(unknown)}"
    params = asked.get("disaggregated_params")
    if params is not None and (unknown := params.keys() - _DISAGGREGATED_FIELDS):
        return f"Extra inputs are not permitted: disaggregated_params.{sorted(unknown)}"
    if asked.get("stream_options") and not asked.get("stream"):
        return "Stream options can only be defined when stream is true."
    if asked.get("response_format", {"type": "text"})["type"] not in _FORMATS:
        return "response_format.type is unknown"
    if not all(isinstance(token, int) for token in asked["prompt"]):
        return "prompt must be token ids here"
    if params is not None and params["request_type"] == "context_only" and asked.get("stream"):
        return "context_only requests cannot be streamed"
    return None


def _usage(prompt: list[int], count: int, cached: int) -> dict[str, Any]:
    details = {"cached_tokens": cached}
    return {
        "prompt_tokens": len(prompt),
        "completion_tokens": count,
        "total_tokens": len(prompt) + count,
        "prompt_tokens_details": details,
    }


def _event(writer: asyncio.StreamWriter, content: dict[str, Any]) -> None:
    data = f"data: {json.dumps(content)}\n\n".encode()
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


def _write(writer: asyncio.StreamWriter, status: int, text: str) -> None:
    data = text.encode()
    writer.write(b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (status, len(data), data))


@asynccontextmanager
async def serving(double: TrtllmDouble, port: int = 0) -> AsyncIterator[TrtllmDouble]:
    server = await asyncio.start_server(double.serve, "127.0.0.1", port)
    double.port = server.sockets[0].getsockname()[1]
    try:
        yield double
    finally:
        server.close()
