"""Records what a real SGLang answers, for tests/unit/sglang: `python tools/record_sglang.py OUTPUT.json URL [DECODE_URL]`.

One URL is a server as Polyphase starts it, with page size 16 and the model of tools/make_tiny_model.py, served as `tiny`; without
--incremental-streaming-output, for the cumulative recording. Two are its halves (`--disaggregation-mode`), prefill first; what a decode
server says when the prefill server dies was added by hand. Request bodies are those that our dialect writes. Look at the difference before
committing.
"""

from __future__ import annotations

import base64
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
import zmq

from polyphase.engines.served.kv_events import connectable
from polyphase.engines.served.sse import DONE, EventSplitter
from polyphase.engines.sglang.bootstrap import BootstrapPrefill
from polyphase.engines.sglang.dialect import GenerateDialect, Manners
from polyphase.engines.sglang.probe import ServerFacts, facts_of, probe_body
from polyphase.wire.kv import EngineOffer
from polyphase.wire.requests import Grammar, GrammarKind, SamplingParams, StopConditions, Submit

GREEDY = SamplingParams(seed=1, temperature=0.0)
LONG = list(range(100, 200))
# Of the five hundred things that /server_info tells, those that we read, and what they depend on.
KEPT = (
    "chunked_prefill_size", "context_length", "device", "disable_radix_cache", "disaggregation_bootstrap_port", "disaggregation_mode",
    "disaggregation_transfer_backend", "dp_size", "dtype", "enable_deterministic_inference", "enable_priority_scheduling",
    "grammar_backend", "incremental_streaming_output", "kv_cache_dtype", "kv_events", "kv_events_config", "max_prefill_tokens",
    "max_req_input_len", "max_running_requests", "max_total_num_tokens", "page_size", "schedule_low_priority_values_first",
    "served_model_name", "skip_tokenizer_init", "version",
)  # fmt: skip


def ask(name: str, prompt: list[int], max_tokens: int = 6, *, sampling: SamplingParams = GREEDY, **further: Any) -> Submit:
    stop = further.pop("stop", None) or StopConditions(max_tokens=max_tokens, ignore_eos=True)
    return Submit(request_id=name, token_ids=prompt, prompt_token_count=len(prompt), sampling=sampling, stop=stop, **further)


def requests() -> list[Submit]:
    """In the order in which they are sent."""
    with_logprobs = SamplingParams(seed=1, temperature=0.0, top_logprobs=2)
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False})
    return [
        ask("greedy", [10, 11, 12, 13, 14], sampling=with_logprobs),
        ask("sampled", [10, 11, 12, 13, 14], sampling=SamplingParams(seed=7, temperature=0.8, top_k=20)),
        ask("long", LONG, 40),
        ask("long-again", LONG),
        ask("salted", LONG, cache_salt="tenant-a"),
        ask("schema", [10, 11, 12], grammar=Grammar(GrammarKind.JSON_SCHEMA, schema), stop=StopConditions(max_tokens=24)),
        ask("choice", [10, 11, 12], grammar=Grammar(GrammarKind.CHOICE, '["kabas?", "loden."]'), stop=StopConditions(max_tokens=24)),
        ask("no-grammar", [10, 11, 12], grammar=Grammar(GrammarKind.JSON_SCHEMA, "{{"), stop=StopConditions(max_tokens=24)),
        ask("no-adapter", [10, 11, 12], lora="unknown"),
        ask("warm-up", [0, 0, 0, 0], 2),
    ]


def conformance(tokens: list[int]) -> list[Submit]:
    """What polyphase.testing.engines asks for when it knows the first six `tokens` behind its prompt."""
    return [
        ask("rest", LONG + tokens[:2], stop=StopConditions(max_tokens=4, ignore_eos=True)),
        ask("logprobs", LONG, sampling=SamplingParams(seed=1, temperature=0.0, top_logprobs=2)),
        ask("stop-token", LONG, stop=StopConditions(max_tokens=6, ignore_eos=True, stop_token_ids=[tokens[2]])),
    ]


def dialect_of(facts: ServerFacts) -> GenerateDialect:
    return GenerateDialect(Manners(facts.takes_priority, facts.is_incremental, facts.is_deterministic, facts.takes_grammars, facts.mode))


def client_of(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=120, trust_env=False, headers={"content-type": "application/json"})


def pages_of(client: httpx.Client) -> dict[str, Any]:
    info = client.get("/server_info").json()
    models = client.get("/v1/models").json()
    for model in models["data"]:
        model.update(id="tiny", root="tiny")
    info["served_model_name"] = "tiny"
    return {
        "/server_info": {key: info[key] for key in KEPT if key in info},
        "/v1/models": models,
        "/v1/loads": client.get("/v1/loads").json(),
    }


def facts_in(pages: dict[str, Any]) -> ServerFacts:
    return facts_of(pages["/server_info"], pages["/v1/models"]["data"], json.dumps(pages["/v1/loads"]).encode())


def record(url: str) -> dict[str, Any]:
    client = client_of(url)
    pages = pages_of(client)
    facts = facts_in(pages)
    assert facts.events is not None
    assert facts.events.replay_endpoint is not None
    replay_endpoint = connectable(facts.events.replay_endpoint, "127.0.0.1")
    dialect = dialect_of(facts)
    client.post("/flush_cache").raise_for_status()
    exchanges = [exchange(client, "probe", "/generate", json.dumps(probe_body()).encode())]
    before = len(replay(replay_endpoint))
    exchanges.append(interrupted(client, dialect))
    tokens: list[int] = []
    for asked in requests():
        exchanges.append(exchange(client, asked.request_id, dialect.path, dialect.body(asked, asked.stop.max_tokens)))
        if asked.request_id == "long-again":
            tokens = tokens_in(dialect, exchanges[-1]["answer"])
    for asked in conformance(tokens):
        exchanges.append(exchange(client, asked.request_id, dialect.path, dialect.body(asked, asked.stop.max_tokens)))
    client.post("/flush_cache").raise_for_status()
    client.post(dialect.path, content=dialect.body(requests()[2], 6)).raise_for_status()
    time.sleep(0.5)  # its publisher has a thread of its own
    pages["/v1/loads"] = client.get("/v1/loads").json()
    events = replay(replay_endpoint)[before:]
    pages["/server_info"]["kv_events_config"] = json.dumps(
        {"publisher": "zmq", "endpoint": "ipc:///private/events", "replay_endpoint": "ipc:///private/replay", "topic": facts.events.topic}
    )
    return {
        "version": facts.version,
        "pages": pages,
        "exchanges": exchanges,
        "kv_events": [
            [topic, base64.b64encode(number.to_bytes(8, "big")).decode(), payload] for number, (topic, _, payload) in enumerate(events)
        ],
    }


def record_halves(prefill_url: str, decode_url: str) -> dict[str, Any]:
    """One request, with a cold and with a warm cache; what its legs are asked, and what they answer."""
    halves = {"prefill": client_of(prefill_url), "decode": client_of(decode_url)}
    pages = {half: pages_of(client) for half, client in halves.items()}
    facts = {half: facts_in(page) for half, page in pages.items()}
    decode = dialect_of(facts["decode"])
    prefill = BootstrapPrefill(
        dialect_of(facts["prefill"]), "127.0.0.1", facts["prefill"].bootstrap_port or 0, facts["prefill"].context_length
    )
    exchanges: dict[str, list[dict[str, Any]]] = {"prefill": [], "decode": []}
    halves["prefill"].post("/flush_cache").raise_for_status()
    for name, asked in [("cold", ask("cold", LONG)), ("warm", ask("warm", LONG))]:
        params = prefill.early_params(asked)
        offer = EngineOffer("prefill-0", 1, "", "lease", 0, "sglang", params, len(LONG))
        bodies = {
            "prefill": prefill.prefill_body(asked, params),
            "decode": decode.body(msgspec.structs.replace(asked, offer=offer), asked.stop.max_tokens),
        }

        def leg(half: str, name: str = name, bodies: dict[str, bytes] = bodies) -> None:
            exchanges[half].append(exchange(halves[half], name, "/generate", bodies[half]))

        legs = [threading.Thread(target=leg, args=(half,)) for half in halves]
        for one in legs:
            one.start()
        for one in legs:
            one.join()
    return {
        "version": facts["decode"].version,
        **{half: {"pages": pages[half], "exchanges": exchanges[half], "kv_events": []} for half in halves},
    }


def exchange(client: httpx.Client, name: str, path: str, body: bytes) -> dict[str, Any]:
    answer = client.post(path, content=body)
    return {"name": name, "path": path, "body": json.loads(body), "status": answer.status_code, "answer": answer.text}


def interrupted(client: httpx.Client, dialect: GenerateDialect) -> dict[str, Any]:
    """A request that is aborted by its name after its first token, as somebody else might do it."""
    asked = ask("aborted", list(range(300, 340)), 2000)
    body = dialect.body(asked, asked.stop.max_tokens)
    answer = b""
    with client.stream("POST", dialect.path, content=body) as stream:
        for part in stream.iter_bytes():
            if not answer:
                httpx.post(
                    client.base_url.join("/abort_request"), content=dialect.abort_body(asked), headers=client.headers, trust_env=False
                )
            answer += part
    return {"name": "aborted", "path": dialect.path, "body": json.loads(body), "status": 200, "answer": answer.decode()}


def tokens_in(dialect: GenerateDialect, answer: str) -> list[int]:
    chunks = [dialect.read(data) for data in EventSplitter().push(answer.encode()) if data != DONE]
    return list(chunks[-1].token_ids) if chunks[-1].is_whole else [token for chunk in chunks for token in chunk.token_ids]


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
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    found = record(sys.argv[2]) if len(sys.argv) == 3 else record_halves(*sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
