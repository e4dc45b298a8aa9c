"""What the worker of an engine that is a server of its own is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from polyphase.wire.cards import Role


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """None leaves the choice to the engine."""

    model: str  # a folder, or a name on the hub
    name: str | None  # under which it is served
    folder: Path  # private; for its sockets
    attach: str | None = None  # URL of a running server; nothing is launched then
    python: str | None = None  # an interpreter that can import the engine
    command: str | None = None  # in place of the stock command
    arguments: str = ""  # further flags of it, as in a shell
    role: Role = Role.BOTH
    device: str = "auto"
    dtype: str = "auto"
    block_size: int | None = None  # tokens
    kv_bytes: int | None = None
    context_length: int | None = None
    max_batch_tokens: int | None = None
    max_running: int | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)  # LoRA: folder by name
    api_key: str | None = field(default=None, repr=False)  # that the server wants
    start_timeout_s: float = 1800.0  # a first download of the weights counts
