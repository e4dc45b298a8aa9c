"""Records what real vLLMs answer, for tests/unit/vllm: `python tools/record_vllm.py PREFILL_URL DECODE_URL OUTPUT.json`.

The URLs are of running servers with the flags that Polyphase gives them (`--prefill 1 --decode 1`), VLLM_SERVER_DEV_MODE=1, block size 32,
an empty cache and the model of tools/make_tiny_model.py, served as `tiny`. Request bodies are those that our dialects write. Look at the
difference before committing.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import httpx
import zmq

from polyphase.engines.served.dialect import Dialect
from polyphase.engines.served.kv_events import connectable
from polyphase.engines.served.sse import DONE, EventSplitter
from polyphase.engines.vllm.dialects import CompletionsDialect, GenerateDialect, VllmDialect
from polyphase.engines.vllm.hand_over import ASK_FOR_OFFER, NixlPrefill
from polyphase.engines.vllm.probe import completions_probe_body, probe_body
from polyphase.wire.kv import EngineOffer
from polyphase.wire.requests import SamplingParams, StopConditions, Submit

GREEDY = SamplingParams(seed=1, temperature=0.0)
LONG = list(range(100, 200))


def ask(name: str, prompt: list[int], max_tokens: int = 6, *, sampling: SamplingParams = GREEDY, **further: Any) -> Submit:
    stop = further.pop("stop", None) or StopConditions(max_tokens=max_tokens, ignore_eos=True)
    return Submit(request_id=name, token_ids=prompt, prompt_token_count=len(prompt), sampling=sampling, stop=stop, **further)


def requests() -> list[Submit]:
    """In the order in which they are sent."""
    with_logprobs = SamplingParams(seed=1, temperature=0.0, top_logprobs=2)
    return [
        ask("greedy", [10, 11, 12, 13, 14], sampling=with_logprobs),
        ask("sampled", [10, 11, 12, 13, 14], sampling=SamplingParams(seed=7, temperature=0.8, top_k=20)),
        ask("long", LONG, 40),
        ask("long-again", LONG),
        ask("salted", LONG, cache_salt="tenant-a"),
        ask("out-of-vocabulary", [99999]),
        ask("warm-up", [0, 0, 0, 0], 2),
    ]


def conformance(tokens: list[int]) -> list[Submit]:
    """What polyphase.testing.engines asks for when it knows the first six `tokens` behind its prompt."""
    return [
        ask("rest", LONG + tokens[:2], stop=StopConditions(max_tokens=4, ignore_eos=True)),
        ask("logprobs", LONG, sampling=SamplingParams(seed=1, temperature=0.0, top_logprobs=2)),
        ask("stop-token", LONG, stop=StopConditions(max_tokens=6, ignore_eos=True, stop_token_ids=[tokens[2]])),
    ]


def tokens_of(client: httpx.Client, dialect: Dialect, request: Submit) -> list[int]:
    answer = client.post(dialect.path, content=dialect.body(request, request.stop.max_tokens)).raise_for_status().content
    return [token for data in EventSplitter().push(answer) if data != DONE for token in dialect.read(data).token_ids]


def hand_over(prefill: httpx.Client, decode: httpx.Client, dialect: VllmDialect) -> list[dict[str, Any]]:
    """Both legs of a request. Between them the offer, as a worker would make it of the answer."""
    name = type(dialect).__name__
    asked = ask("prefill", list(range(300, 400)), hand_over=True)
    legs = NixlPrefill(dialect)
    first = exchange(prefill, f"{name}/prefill", dialect.path, legs.prefill_body(asked, None), "prefill")
    params = legs.read_prefill(first["answer"].encode()).offer_params
    if params is None:
        sys.exit(f"no offer came of {prefill.base_url}: it was started without a connector")
    offer = EngineOffer("prefill-0", 1, "", "lease", 0, "vllm-nixl", params, 100)
    taken = ask("decode", asked.token_ids, offer=offer)
    return [first, exchange(decode, f"{name}/decode", dialect.path, dialect.body(taken, taken.stop.max_tokens), "decode")]


def client_of(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=120, trust_env=False, headers={"content-type": "application/json"})


def record(url: str, decode_url: str) -> dict[str, Any]:
    client, decode = client_of(url), client_of(decode_url)
    found: dict[str, Any] = {"version": client.get("/version").json()["version"], "pages": {}, "exchanges": []}
    sources = client.get("/kv_event_sources").json()
    replay_endpoint = connectable(sources["0"]["replay_endpoint"], "127.0.0.1")
    before = len(replay(replay_endpoint))
    found["exchanges"].append(exchange(client, "probe", "/inference/v1/generate", json.dumps(probe_body("tiny")).encode()))
    dialects = (GenerateDialect("tiny", takes_priority=True), CompletionsDialect("tiny", takes_priority=True))
    for dialect in dialects:
        all_asked = requests()
        all_asked += conformance(tokens_of(client, dialect, ask("long", LONG, 6)))
        for asked in all_asked:
            name, body = f"{type(dialect).__name__}/{asked.request_id}", dialect.body(asked, asked.stop.max_tokens)
            found["exchanges"].append(exchange(client, name, dialect.path, body, asked.request_id))
        client.post("/reset_prefix_cache").raise_for_status()
    client.post(dialect.path, content=dialect.body(requests()[0], 6)).raise_for_status()  # events go out with a step
    for dialect in dialects:  # at last: what is kept for others cannot be cleared
        found["exchanges"] += hand_over(client, decode, dialect)
    for name, path, probe in (
        ("probe-hand-over", "/inference/v1/generate", probe_body("tiny")),
        ("probe-hand-over-completions", "/v1/completions", completions_probe_body("tiny")),
    ):
        body = json.dumps({**probe, "kv_transfer_params": ASK_FOR_OFFER}).encode()
        found["exchanges"].append(exchange(client, name, path, body))
    kept = [line for line in client.get("/metrics").text.splitlines() if line.startswith("vllm:") and "bucket" not in line]
    found["pages"] = {
        "/version": client.get("/version").json(),
        "/is_sleeping": client.get("/is_sleeping").json(),
        "/v1/models": client.get("/v1/models").json(),
        "/kv_event_sources": sources,
        "/metrics": "\n".join(kept) + "\n",
    }
    for model in found["pages"]["/v1/models"]["data"]:
        model["root"] = "tiny"
    found["kv_events"] = [
        [topic, base64.b64encode(number.to_bytes(8, "big")).decode(), payload]
        for number, (topic, _, payload) in enumerate(replay(replay_endpoint)[before:])
    ]
    for source in sources.values():
        source.update(endpoint="ipc:///private/events", replay_endpoint="ipc:///private/replay")
    return found


def exchange(client: httpx.Client, name: str, path: str, body: bytes, request_id: str = "probe") -> dict[str, Any]:
    answer = client.post(path, content=body, headers={"x-request-id": request_id})
    return {"name": name, "path": path, "body": json.loads(body), "status": answer.status_code, "answer": answer.text}


def replay(endpoint: str) -> list[list[str]]:
    """Frames of every batch since the start, base64."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.rcvtimeo = 10_000
        socket.connect(endpoint)
        socket.send_multipart([b"", (0).to_bytes(8, "big")])
        batches = []
        while (frames := socket.recv_multipart())[-2] != b"\xff" * 8:
            batches.append([base64.b64encode(frame).decode() for frame in frames[1:]])
        return batches


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    Path(sys.argv[3]).write_text(json.dumps(record(sys.argv[1], sys.argv[2]), indent=1) + "\n")
