"""What a vLLM worker is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """None leaves the choice to vLLM."""

    model: str  # a folder, or a name on the hub
    name: str | None  # under which it is served
    folder: Path  # private; for the sockets of its KV events
    attach: str | None = None  # URL of a running server; nothing is launched then
    python: str | None = None  # an interpreter that can import vllm
    command: str | None = None  # in place of `vllm serve`
    arguments: str = ""  # further flags of vllm serve, as in a shell
    device: str = "auto"
    dtype: str = "auto"
    block_size: int | None = None  # tokens
    kv_bytes: int | None = None
    context_length: int | None = None
    max_batch_tokens: int | None = None
    max_running: int | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)  # LoRA: folder by name
    hands_over: bool = False  # with vLLM's NIXL connector, between prefill and decode
    api_key: str | None = field(default=None, repr=False)  # that the server wants
    start_timeout_s: float = 1800.0  # a first download of the weights counts
