"""What a vLLM server says of itself: version, model, cache, events, and how it can be asked for tokens. Blocking: before the loop."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from polyphase.core.errors import ModelLoadError
from polyphase.engines.served.kinds import paths_taken
from polyphase.engines.served.secrets import VARIABLE
from polyphase.engines.vllm.hand_over import ASK_FOR_OFFER
from polyphase.engines.vllm.metrics import cache_dtype_of, cache_of, ranks_of

log = logging.getLogger(__name__)

FIRST_TOKEN_TIMEOUT_S = 300.0  # kernels may be compiled
TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class EventSource:
    """Endpoints as the engine binds them."""

    endpoint: str
    replay_endpoint: str | None
    topic: str


@dataclass(frozen=True, slots=True)
class ServerFacts:
    version: str
    model: str  # as requests have to call it
    context_length: int
    block_size: int
    block_count: int
    has_generate: bool  # /inference/v1/generate
    hands_over: bool  # it keeps blocks of a prompt for another server
    events: list[EventSource | None]  # of each data-parallel rank; None: it publishes none
    root: str = ""  # the model's folder or name, as the server knows it
    cache_dtype: str = "auto"
    adapters: tuple[str, ...] = ()  # LoRA
    can_sleep: bool = False
    paths: dict[str, str] = field(default_factory=dict)  # of bodies that it takes, by kind

    @property
    def rank_count(self) -> int:
        return len(self.events)

    @property
    def has_structured_outputs(self) -> bool:
        """Whether it knows the field of this name. Versions before 0.11 ignore it, and would answer with whatever they like."""
        numbers = re.match(r"v?(\d+)\.(\d+)", self.version)
        return self.has_generate or (numbers is not None and (int(numbers[1]), int(numbers[2])) >= (0, 11))


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2.0, trust_env=False, verify=False).status_code == 200
    except httpx.HTTPError:
        return False


def probe(url: str, wanted_model: str | None, headers: Mapping[str, str] | None = None) -> ServerFacts:
    """`headers`: of each request. Raises: ModelLoadError if it is no vLLM that can be used, or does not serve the wanted model."""
    with httpx.Client(base_url=url, timeout=TIMEOUT_S, headers=headers, trust_env=False, verify=False) as client:
        try:
            version = str(_json(client, "/version").get("version", "unknown"))
            listed = _models(_json(client, "/v1/models"))
            model = _wanted(listed, wanted_model, url)
            metrics = client.get("/metrics").text
            block_size, block_count = cache_of(metrics)
            sources = _json(client, "/kv_event_sources", must=False)
            sleeps = _json(client, "/is_sleeping", must=False).get("is_sleeping")
            if sleeps:
                raise ModelLoadError(f"vLLM at {url} is asleep, and hangs its callers; wake it: curl -X POST {url}/wake_up")
            has_generate = _has_generate(client, model)
            hands_over = _hands_over(client, model, has_generate=has_generate)
            paths = paths_taken(client, model)
        except httpx.HTTPError as error:
            raise ModelLoadError(f"vLLM at {url} does not answer: {error or type(error).__name__}") from error
    if not block_size or not block_count:
        raise ModelLoadError(f"vLLM {version} at {url} does not tell its KV cache in /metrics (vllm:cache_config_info)")
    return ServerFacts(
        version=version,
        model=model,
        context_length=int(listed[model].get("max_model_len") or 0),
        block_size=block_size,
        block_count=block_count,
        has_generate=has_generate,
        hands_over=hands_over,
        events=[_source(sources[rank]) for rank in sorted(sources, key=int)] if sources else [None] * ranks_of(metrics),
        root=str(listed[model].get("root") or model),
        cache_dtype=cache_dtype_of(metrics),
        can_sleep=sleeps is False,
        paths=paths,
        adapters=adapters_of(listed, model),
    )


def _json(client: httpx.Client, path: str, *, must: bool = True) -> dict[str, Any]:
    response = client.get(path)
    try:
        found = response.json() if response.status_code == 200 else None
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    if response.status_code in (401, 403) and must:
        raise ModelLoadError(f"the server at {client.base_url} wants an API key, or another one: set {VARIABLE}")
    if must:
        raise ModelLoadError(f"what answers at {client.base_url} is no vLLM: GET {path} gave {response.status_code}")
    return {}


def _models(page: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By name; LoRA adapters have a parent."""
    return {str(entry["id"]): entry for entry in page.get("data", []) if isinstance(entry, dict) and "id" in entry}


def _wanted(listed: dict[str, dict[str, Any]], wanted: str | None, url: str) -> str:
    found = wanted if wanted in listed else None
    if wanted is None:
        found = next((name for name, entry in listed.items() if entry.get("parent") is None), None)
    if found is None:
        raise ModelLoadError(f"vLLM at {url} does not serve {wanted!r}, but {', '.join(listed) or 'nothing'}")
    return found


def adapters_of(listed: dict[str, dict[str, Any]], model: str) -> tuple[str, ...]:
    return tuple(sorted(name for name, entry in listed.items() if entry.get("parent") == model))


def _has_generate(client: httpx.Client, model: str) -> bool:
    """By asking for a token. Without --enable-scale-out it is forbidden, and older versions do not know it."""
    return client.post("/inference/v1/generate", json=probe_body(model), timeout=FIRST_TOKEN_TIMEOUT_S).status_code == 200


def completions_probe_body(model: str) -> dict[str, Any]:
    return {"model": model, "prompt": [1], "max_tokens": 1, "temperature": 0}


def probe_body(model: str) -> dict[str, Any]:
    return {"model": model, "token_ids": [1], "sampling_params": {"max_tokens": 1, "temperature": 0, "detokenize": False}}


def _hands_over(client: httpx.Client, model: str, *, has_generate: bool) -> bool:
    """By asking for a prompt to be kept, of one token: with a connector, the answer says where. It is kept for the lease, half a minute."""
    if has_generate:
        path, body = "/inference/v1/generate", probe_body(model)
    else:
        path, body = "/v1/completions", completions_probe_body(model)
    response = client.post(path, json={**body, "kv_transfer_params": ASK_FOR_OFFER}, timeout=FIRST_TOKEN_TIMEOUT_S)
    try:
        params = response.json().get("kv_transfer_params") if response.status_code == 200 else None
    except (ValueError, AttributeError):
        return False
    return isinstance(params, dict) and bool(params.get("remote_engine_id"))


def _source(found: Any) -> EventSource | None:
    """Of one rank."""
    if not isinstance(found, dict) or not found.get("enable_kv_cache_events") or found.get("publisher") != "zmq":
        return None
    return EventSource(str(found["endpoint"]), found.get("replay_endpoint") or None, str(found.get("topic") or ""))
