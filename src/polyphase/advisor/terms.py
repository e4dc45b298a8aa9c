"""The columns whose weighted sums are ITL and TTFT, in milliseconds. `efficiency` holds the weights."""

from __future__ import annotations

import numpy as np

from polyphase.advisor.counts import DECODE_TERMS, PREFILL_TERMS, decode_terms, kv_bytes_of_sequence, prefill_terms
from polyphase.advisor.deployment import Serving, Setting, Traffic
from polyphase.advisor.mapping import Floats, Mappings

# Beside the decode step: prefills of other requests that fall between two tokens of one, where one engine does both.
ITL_TERMS = (*DECODE_TERMS, "beside_flops", "beside_attention", "beside_comm")
TTFT_TERMS = (
    "flops",
    "attention",
    "comm",
    "weights",
    "layers",
    "burst",  # prompts that arrive together wait for each other
    "queue",  # prompts in a queue with the load's utilisation
    "step_shared",  # a decode step under way, and the first one
    "step_own",
    "request",  # per request: HTTP, scheduling
    "tokens",  # per 1,000 prompt tokens: tokenising
    "concurrency",  # per request in the deployment: the frontend's share
    "transfer",  # of the KV cache to the decode worker
)
BURST = 0.1  # of the requests start together, where a measurement sends ten times as many as it keeps in flight
_MAX_UTILISATION = 0.95
# A prefill's terms at once, with typical weights, to see how busy prefill is.
_ROUGH = np.array([1.5, 1.5, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0])
_P = {name: index for index, name in enumerate(PREFILL_TERMS)}


def itl_terms(setting: Setting, mappings: Mappings, batch: Floats, traffic: Traffic) -> Floats:
    """float64[n, len(ITL_TERMS)]. `batch` per data parallel rank."""
    spec = setting.speculation
    decode = decode_terms(
        setting.shape, setting.accelerator, setting.precision, mappings, batch, traffic.seen_tokens, 1.0 + spec.draft_tokens
    )
    decode = decode * (1.0 + spec.draft_tokens / setting.shape.layer_count) / spec.tokens_per_step
    if setting.serving is Serving.DISAGGREGATED:
        return np.concatenate([decode, np.zeros((len(mappings), 3))], axis=1)
    prefill = prefill_terms(setting.shape, setting.accelerator, setting.precision, mappings, *_prompt(traffic))
    share = batch / traffic.osl
    beside = np.stack(
        [
            share * (prefill[:, _P["flops"]] + prefill[:, _P["expert_flops"]]),
            share * prefill[:, _P["attention"]],
            share * (prefill[:, _P["reduce"]] + prefill[:, _P["exchange"]]),
        ],
        axis=1,
    )
    return np.concatenate([decode, beside], axis=1)


def ttft_terms(
    setting: Setting,
    mappings: Mappings,
    waiting: Floats,
    concurrency: Floats,
    itl_ms: Floats,
    traffic: Traffic,
) -> Floats:
    """float64[n, len(TTFT_TERMS)]. `mappings` of the engine that prefills; `waiting`: requests in the deployment per rank that prefills."""
    prefill = prefill_terms(setting.shape, setting.accelerator, setting.precision, mappings, *_prompt(traffic))
    is_shared = setting.serving is Serving.AGGREGATED
    rough = prefill @ _ROUGH
    busy = np.minimum(waiting * rough / (traffic.osl * itl_ms), _MAX_UTILISATION)
    zero, one = np.zeros(len(mappings)), np.ones(len(mappings))
    kv_bytes = kv_bytes_of_sequence(setting.shape, setting.precision, traffic.isl)
    return np.stack(
        [
            prefill[:, _P["flops"]] + prefill[:, _P["expert_flops"]],
            prefill[:, _P["attention"]],
            prefill[:, _P["reduce"]] + prefill[:, _P["exchange"]],
            prefill[:, _P["weights"]],
            prefill[:, _P["layers"]],
            BURST * waiting * rough,
            rough * busy / (1 - busy),
            itl_ms if is_shared else zero,
            zero if is_shared else itl_ms,
            one,
            one * traffic.isl / 1e3,
            concurrency * one,
            zero if is_shared else one * kv_bytes / setting.accelerator.network_bytes_per_s * 1e3,
        ],
        axis=1,
    )


def _prompt(traffic: Traffic) -> tuple[float, float]:
    """Tokens to compute, at least one, and tokens found in the cache."""
    cached = min(traffic.cached_tokens, traffic.isl - 1)
    return traffic.isl - cached, cached
