"""SGLang's load: `/v1/loads`, or of older versions `/get_load`. Source: SGLang 0.5.23; the older form as its source had it."""

from __future__ import annotations

import msgspec

from polyphase.core.errors import WireError
from polyphase.engines.served.dialect import Gauges

PATH = "/v1/loads"
OLD_PATH = "/get_load"


class RankLoad(msgspec.Struct):
    """Of one data-parallel rank."""

    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    token_usage: float = 0.0
    max_running_requests: int = 0
    total_prefill_uncached_tokens: int = 0
    decode_moments: list[float] | None = None  # sums over all decode steps; the first counts them


class _Loads(msgspec.Struct):
    loads: list[RankLoad]


class _OldLoad(msgspec.Struct):
    num_reqs: int = 0  # with those that wait
    num_waiting_reqs: int = 0
    num_tokens: int = 0


def rank_loads(page: bytes) -> list[RankLoad]:
    """Raises: WireError."""
    try:
        return msgspec.json.decode(page, type=_Loads).loads
    except msgspec.DecodeError as error:
        raise WireError(f"SGLang's load cannot be understood: {error}") from error


def gauges_of(page: bytes) -> Gauges:
    """Over all ranks: counts add up, and the fullest cache counts. Raises: WireError."""
    loads = rank_loads(page)
    return Gauges(
        running_count=sum(load.num_running_reqs for load in loads),
        waiting_count=sum(load.num_waiting_reqs for load in loads),
        used_share=max((load.token_usage for load in loads), default=0.0),
        iterations=sum(load.total_prefill_uncached_tokens + int((load.decode_moments or [0.0])[0]) for load in loads),
    )


def gauges_of_old(page: bytes, kv_tokens: int) -> Gauges:
    """Without steps: progress is seen by the tokens that come. Raises: WireError."""
    try:
        loads = msgspec.json.decode(page, type=list[_OldLoad])
    except msgspec.DecodeError as error:
        raise WireError(f"SGLang's load cannot be understood: {error}") from error
    waiting = sum(load.num_waiting_reqs for load in loads)
    fullest = max((load.num_tokens for load in loads), default=0)
    return Gauges(
        running_count=max(0, sum(load.num_reqs for load in loads) - waiting),
        waiting_count=waiting,
        used_share=min(1.0, fullest / kv_tokens) if kv_tokens else 0.0,
    )
