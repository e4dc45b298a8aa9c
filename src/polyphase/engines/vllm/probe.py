"""What a vLLM server says of itself: version, model, cache, events, and how it can be asked for tokens. Blocking: before the loop."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from typing import Any

import httpx

from polyphase.core.errors import ModelLoadError
from polyphase.engines.served.kinds import paths_taken
from polyphase.engines.vllm.metrics import cache_of

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
    events: EventSource | None
    rank_count: int  # data parallel
    paths: dict[str, str] = field(default_factory=dict)  # of bodies that it takes, by kind
    adapters: tuple[str, ...] = ()  # LoRA, by the names that it lists

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


def probe(url: str, wanted_model: str | None) -> ServerFacts:
    """Raises: ModelLoadError if it is no vLLM that can be used, or does not serve the wanted model."""
    with httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False, verify=False) as client:
        try:
            version = str(_json(client, "/version").get("version", "unknown"))
            model, context_length, adapters = _model(_json(client, "/v1/models"), wanted_model, url)
            block_size, block_count = cache_of(client.get("/metrics").text)
            sources = _json(client, "/kv_event_sources", must=False)
            has_generate = _has_generate(client, model)
            paths = paths_taken(client, model)
        except httpx.HTTPError as error:
            raise ModelLoadError(f"vLLM at {url} does not answer: {error or type(error).__name__}") from error
    if not block_size or not block_count:
        raise ModelLoadError(f"vLLM {version} at {url} does not tell its KV cache in /metrics (vllm:cache_config_info)")
    source, ranks = _source(sources), max(1, len(sources))
    return ServerFacts(version, model, context_length, block_size, block_count, has_generate, source, ranks, paths, adapters)


def _json(client: httpx.Client, path: str, *, must: bool = True) -> dict[str, Any]:
    response = client.get(path)
    try:
        found = response.json() if response.status_code == 200 else None
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    if must:
        raise ModelLoadError(f"what answers at {client.base_url} is no vLLM: GET {path} gave {response.status_code}")
    return {}


def _model(listed: dict[str, Any], wanted: str | None, url: str) -> tuple[str, int, tuple[str, ...]]:
    models = {str(entry["id"]): entry for entry in listed.get("data", []) if isinstance(entry, dict) and "id" in entry}
    found = models.get(wanted) if wanted is not None else next(iter(models.values()), None)
    if found is None:
        raise ModelLoadError(f"vLLM at {url} does not serve {wanted!r}, but {', '.join(models) or 'nothing'}")
    adapters = sorted(name for name, entry in models.items() if entry.get("parent") == found["id"])
    return str(found["id"]), int(found.get("max_model_len") or 0), tuple(adapters)


def _has_generate(client: httpx.Client, model: str) -> bool:
    """By asking for a token. Without --enable-scale-out it is forbidden, and older versions do not know it."""
    return client.post("/inference/v1/generate", json=probe_body(model), timeout=FIRST_TOKEN_TIMEOUT_S).status_code == 200


def probe_body(model: str) -> dict[str, Any]:
    return {"model": model, "token_ids": [1], "sampling_params": {"max_tokens": 1, "temperature": 0, "detokenize": False}}


def _source(sources: dict[str, Any]) -> EventSource | None:
    """Of a server with one rank; events of several could not be told apart by the router, which sees one worker."""
    if len(sources) != 1:
        return None
    (found,) = sources.values()
    if not isinstance(found, dict) or not found.get("enable_kv_cache_events") or found.get("publisher") != "zmq":
        return None
    return EventSource(str(found["endpoint"]), found.get("replay_endpoint") or None, str(found.get("topic") or ""))
