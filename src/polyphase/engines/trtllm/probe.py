"""What a TensorRT-LLM server says of itself: version, model, cache, and whether it tells token ids. Blocking: before the loop."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import httpx

from polyphase.core.errors import ModelLoadError, WireError
from polyphase.engines.served.secrets import headers_of
from polyphase.engines.trtllm import load
from polyphase.engines.trtllm.kv_events import PATH as EVENTS_PATH

log = logging.getLogger(__name__)

FIRST_TOKEN_TIMEOUT_S = 600.0  # kernels may be tuned
TIMEOUT_S = 10.0
UNTOLD_BLOCK_SIZE = 32  # Source: default of `tokens_per_block`


@dataclass(frozen=True, slots=True)
class ServerFacts:
    version: str
    model: str  # as requests have to call it
    block_size: int
    block_count: int  # 0: it does not say
    has_events: bool
    rank_count: int  # attention data parallel


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5.0, trust_env=False, verify=False).status_code == 200
    except httpx.HTTPError:
        return False


def probe(url: str, api_key: str | None = None) -> ServerFacts:
    """Returns once it has computed a token.

    Raises: ModelLoadError if it is no TensorRT-LLM that can be used.
    """
    with httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False, verify=False, headers=headers_of(api_key)) as client:
        try:
            version = _json(client, "/version").get("version", "unknown")
            listed = _json(client, "/v1/models").get("data") or []
            if not listed:
                raise ModelLoadError(f"what answers at {url} is no TensorRT-LLM: GET /v1/models lists nothing")
            model = str(listed[0]["id"])
            _check_token(client, model)
            iterations = _iterations(client)
            has_events = _has_events(client)
        except httpx.HTTPError as error:
            raise ModelLoadError(f"TensorRT-LLM at {url} does not answer: {error or type(error).__name__}") from error
    stats = next((iteration.kv_cache_stats for iteration in reversed(iterations) if iteration.kv_cache_stats), load.KvStats())
    ranks = {iteration.attention_dp_rank or 0 for iteration in iterations} or {0}
    if not stats.max_num_blocks:
        log.warning("this TensorRT-LLM tells nothing of its KV cache in /metrics (enable_iter_perf_stats: true in its options)")
    return ServerFacts(str(version), model, stats.tokens_per_block or UNTOLD_BLOCK_SIZE, stats.max_num_blocks, has_events, len(ranks))


def probe_body(model: str) -> dict[str, Any]:
    return {"model": model, "prompt": [1], "max_tokens": 1, "detokenize": False, "temperature": 0.0}


def _check_token(client: httpx.Client, model: str) -> None:
    response = client.post("/v1/completions", json=probe_body(model), timeout=FIRST_TOKEN_TIMEOUT_S)
    try:
        choice = response.json()["choices"][0] if response.status_code == 200 else None
    except (ValueError, KeyError, IndexError, TypeError):
        choice = None
    if choice is None:
        raise ModelLoadError(f"TensorRT-LLM at {client.base_url} computes no token: {response.status_code} {response.text[:300]}")
    if not choice.get("token_ids"):
        raise ModelLoadError(f"TensorRT-LLM at {client.base_url} does not tell token ids (detokenize: false); it is too old for Polyphase")


def _iterations(client: httpx.Client) -> list[load.Iteration]:
    """What is taken out here is nobody's any more: the worker is the one consumer."""
    response = client.get(load.PATH)
    try:
        return load.iterations_of(response.content) if response.status_code == 200 else []
    except WireError:
        return []


def _has_events(client: httpx.Client) -> bool:
    """Without `event_buffer_max_size` the list is always empty; a block at least is stored or a pool created by the token above."""
    response = client.post(EVENTS_PATH)
    try:
        return response.status_code == 200 and bool(response.json())
    except ValueError:
        return False


def _json(client: httpx.Client, path: str) -> dict[str, Any]:
    response = client.get(path)
    if response.status_code in (401, 403):
        raise ModelLoadError(f"TensorRT-LLM at {client.base_url} wants another API key: GET {path} gave {response.status_code}")
    try:
        found = response.json() if response.status_code == 200 else None
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}
