"""What an SGLang server says of itself: version, model, cache, events, and its own manners. Blocking: before the loop."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import httpx

from polyphase.core.errors import ModelLoadError, WireError
from polyphase.engines.served.kv_events import LOOPBACK
from polyphase.engines.served.secrets import headers_of
from polyphase.engines.sglang import load

FIRST_TOKEN_TIMEOUT_S = 300.0  # kernels may be compiled
TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class EventSource:
    """Endpoints as the engine binds them; those of rank 0."""

    endpoint: str
    replay_endpoint: str | None
    topic: str
    is_bound: bool  # else it connects

    @property
    def can_be_heard(self) -> bool:
        """Where it connects to this host, the observer binds."""
        return self.is_bound or self.endpoint.startswith(LOOPBACK)

    def of_rank(self, rank: int) -> EventSource:
        """Each data-parallel rank has ports of its own, one after the other."""
        replay = _port_moved(self.replay_endpoint, rank) if self.replay_endpoint else None
        return replace(self, endpoint=_port_moved(self.endpoint, rank), replay_endpoint=replay)


@dataclass(frozen=True, slots=True)
class ServerFacts:
    version: str
    model: str
    context_length: int  # of prompt and output together
    block_size: int
    kv_tokens: int  # room in its KV cache
    max_batch_tokens: int | None
    max_running: int | None
    rank_count: int  # data parallel
    events: EventSource | None
    adapters: list[str]
    takes_priority: bool
    is_incremental: bool
    is_deterministic: bool
    takes_grammars: bool
    has_loads: bool  # /v1/loads
    keeps_prefixes: bool  # a cache of them; a decode server has none if not told
    kv_dtype: str
    mode: str  # of disaggregation: null, prefill, decode
    bootstrap_port: int | None
    transfer_backend: str


def is_up(url: str) -> bool:
    """503 while it warms up. `/health` costs an idle server a token, which a decode server may have to wait for; so older ones only."""
    for path in ("/ready", "/health"):
        try:
            status = httpx.get(f"{url}{path}", timeout=5.0, trust_env=False, verify=False).status_code
        except httpx.HTTPError:
            return False
        if status != 404:
            return status == 200
    return False


def probe(url: str, api_key: str | None = None) -> ServerFacts:
    """Returns once it has computed a token. Raises: ModelLoadError if it is no SGLang that can be used."""
    with httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False, verify=False, headers=headers_of(api_key)) as client:
        try:
            info = _json(client, "/server_info") or _json(client, "/get_server_info")
            if "max_total_num_tokens" not in info:
                raise ModelLoadError(f"what answers at {url} is no SGLang: GET /server_info tells no max_total_num_tokens")
            models = _json(client, "/v1/models").get("data") or []
            loads = client.get(load.PATH)
            if info.get("disaggregation_mode") in (None, "null"):  # else a token takes two servers
                client.post("/generate", json=probe_body(), timeout=FIRST_TOKEN_TIMEOUT_S).raise_for_status()
        except httpx.HTTPError as error:
            raise ModelLoadError(f"SGLang at {url} does not answer: {error or type(error).__name__}") from error
    return facts_of(info, models, loads.content if loads.status_code == 200 else None)


def probe_body() -> dict[str, Any]:
    return {"input_ids": [1], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}


def facts_of(info: dict[str, Any], models: list[dict[str, Any]], loads: bytes | None) -> ServerFacts:
    """From its pages. Raises: ModelLoadError."""
    page_size, kv_tokens = int(info.get("page_size") or 1), int(info["max_total_num_tokens"])
    if kv_tokens < page_size:
        raise ModelLoadError(f"SGLang has room for {kv_tokens} tokens in its KV cache, which is less than a page of {page_size}")
    source, block_size = _source(info), page_size
    described = info.get("kv_events")
    if isinstance(described, dict):
        block_size = int(described.get("block_size") or page_size)
    named = str(info.get("served_model_name") or info.get("model_path"))
    own = next((model for model in models if not model.get("parent")), {})
    return ServerFacts(
        version=str(info.get("version", "unknown")),
        model=named,
        context_length=_context_length(info, own.get("max_model_len")),
        block_size=block_size,
        kv_tokens=kv_tokens,
        max_batch_tokens=_positive(info.get("chunked_prefill_size")) or _positive(info.get("max_prefill_tokens")),
        max_running=_positive(info.get("max_running_requests")) or _max_running(loads),
        rank_count=int(info.get("dp_size") or 1),
        events=source,
        adapters=[str(model["id"]) for model in models if model.get("parent")],
        takes_priority=bool(info.get("enable_priority_scheduling") and info.get("schedule_low_priority_values_first")),
        is_incremental=bool(info.get("incremental_streaming_output")),
        is_deterministic=bool(info.get("enable_deterministic_inference")),
        takes_grammars=info.get("grammar_backend") not in (None, "none") and not info.get("skip_tokenizer_init"),
        has_loads=loads is not None,
        keeps_prefixes=not info.get("disable_radix_cache"),
        kv_dtype=str(info.get("dtype") if info.get("kv_cache_dtype") in (None, "auto") else info.get("kv_cache_dtype")),
        mode=str(info.get("disaggregation_mode") or "null"),
        bootstrap_port=_positive(info.get("disaggregation_bootstrap_port")),
        transfer_backend=str(info.get("disaggregation_transfer_backend")),
    )


def _context_length(info: dict[str, Any], listed: Any) -> int:
    """SGLang refuses prompts of `max_req_input_len` tokens, some before the context's or the cache's end; so no request may get there."""
    longest = _positive(info.get("max_req_input_len"))
    whole = _positive(listed) or _positive(info.get("context_length"))
    if longest is None:
        return whole or int(info["max_total_num_tokens"])
    return longest if whole is None else min(longest, whole)


def _json(client: httpx.Client, path: str) -> dict[str, Any]:
    response = client.get(path)
    if response.status_code in (401, 403):
        raise ModelLoadError(f"SGLang at {client.base_url} wants another API key: GET {path} gave {response.status_code}")
    try:
        found = response.json() if response.status_code == 200 else None
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def _source(info: dict[str, Any]) -> EventSource | None:
    """As its flag --kv-events-config has it, which it tells again."""
    try:
        config = json.loads(info.get("kv_events_config") or "null")
    except (TypeError, ValueError):
        return None
    if not isinstance(config, dict) or config.get("publisher") != "zmq":
        return None
    endpoint = str(config.get("endpoint") or "tcp://*:5557")  # Source: its default
    is_bound = config.get("bind")
    if is_bound is None:
        is_bound = "*" in endpoint or "::" in endpoint or "0.0.0.0" in endpoint or endpoint.startswith("ipc://")  # Source: its rule
    return EventSource(endpoint, config.get("replay_endpoint") or None, str(config.get("topic") or ""), bool(is_bound))


def _port_moved(endpoint: str, by: int) -> str:
    if not endpoint.startswith("tcp://"):
        return endpoint
    address, _, port = endpoint.rpartition(":")
    return f"{address}:{int(port) + by}" if port.isdigit() else endpoint


def _max_running(loads: bytes | None) -> int | None:
    try:
        ranks = load.rank_loads(loads) if loads is not None else []
    except WireError:
        return None
    return sum(rank.max_running_requests for rank in ranks) or None


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
