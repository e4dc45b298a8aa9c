"""Prefill and decode on two vLLM servers, through vLLM's NIXL connector: what is said to them, and what has to be equal at both.

    P   the request with one token and `do_remote_decode`   ──► `kv_transfer_params`: where its blocks are
    D   the request as it is, with these params             ──► pulls the blocks and samples the first token too

A prefill answer has to come in one piece: a streamed one brings no params. P frees the blocks once D has them, or after its lease, which D
renews while the request waits there. If they cannot be pulled, D computes the prompt (`kv_load_failure_policy`).

Source: vLLM 0.32.0, `nixl/pull_scheduler.py` and `nixl/metadata.py` (what its own compatibility hash is made of).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyphase.engines.served import offers
from polyphase.engines.served.dialect import Chunk
from polyphase.engines.served.launching import free_port
from polyphase.engines.vllm.dialects import VllmDialect
from polyphase.wire.requests import Submit

LEASE_S = 30.0  # Source: `kv_lease_duration`, its default
LOOPBACK = "127.0.0.1"
ASK_FOR_OFFER = {"do_remote_decode": True, "do_remote_prefill": False}
_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dri/renderD128")  # CUDA, ROCm, XPU


class NixlPrefill:
    """Implements `PrefillDialect`."""

    lease_s = LEASE_S

    def __init__(self, dialect: VllmDialect) -> None:
        self._dialect = dialect

    def early_params(self, request: Submit) -> dict[str, Any] | None:
        return None

    def prefill_body(self, request: Submit, early_params: dict[str, Any] | None) -> bytes:
        return self._dialect.prefill_body(request, ASK_FOR_OFFER)

    def read_prefill(self, body: bytes) -> Chunk:
        chunk = self._dialect.read(body)
        if chunk.offer_params is None:
            return chunk
        return Chunk(finish=chunk.finish, usage=chunk.usage, offer_params=chunk.offer_params)


def connector_config(*, is_on_cpu: bool) -> dict[str, Any]:
    """For `--kv-transfer-config`. Both roles at once, so that a worker's role can change while it runs."""
    config = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    return {**config, "kv_buffer_device": "cpu"} if is_on_cpu else config


def connector_environment(*, is_on_cpu: bool) -> dict[str, str]:
    """Where the connector meets its peers: on loopback, at a port of its own."""
    wanted = {"VLLM_NIXL_SIDE_CHANNEL_HOST": LOOPBACK, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
    return {**wanted, "UCX_NET_DEVICES": "lo"} if is_on_cpu else wanted


def has_accelerator() -> bool:
    return any(Path(device).exists() for device in _ACCELERATORS)


def kind_of(facts: dict[str, str]) -> str:
    return offers.kind_of("vllm-nixl", facts)


def is_for_want_of_nixl(lines: Sequence[str]) -> bool:
    """Whether a server that ended has complained that NIXL is not installed."""
    return any("nixl" in line.lower() and ("not available" in line or "No module named" in line) for line in lines)
