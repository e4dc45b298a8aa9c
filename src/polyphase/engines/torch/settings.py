"""What a person may choose about the torch engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from polyphase.core.errors import ConfigurationError

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class TorchSettings:
    """`None` and `auto` leave the choice to the engine, which knows the model and the machine."""

    model: str  # a folder, or a name on the hub
    name: str | None = None  # under which it is served; None: the folder's or the hub's name
    device: str = "auto"  # "cpu", "cuda", "cuda:1"; auto: cuda if there is one
    dtype: str = "auto"  # auto: float32 on the CPU, the checkpoint's on CUDA
    block_size: int = 16  # tokens
    kv_bytes: int | None = None  # None: enough for 16 whole contexts, within what the memory allows
    max_batch_tokens: int | None = None  # of one step; None: 512 on the CPU, 2,048 on CUDA
    max_running: int = 64  # sequences that share a step
    max_waiting: int = 1024  # requests beyond these are refused
    context_length: int | None = None  # None: the model's, or what the KV cache can hold
    thread_count: int | None = None  # None: all cores this process may use, up to 8
    lease_s: float = 30.0  # how long blocks are kept for whoever was offered them
    adapters: Mapping[str, str] = field(default_factory=dict)  # LoRA: folder by name

    def __post_init__(self) -> None:
        wrong = [
            (not self.model, "model must be a folder or a hub name, not empty"),
            (self.dtype not in DTYPES, f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}"),
            (self.block_size < 1, f"block_size must be at least 1 token, not {self.block_size}"),
            (self.kv_bytes is not None and self.kv_bytes < 1, f"kv_bytes must be positive, not {self.kv_bytes}"),
            (
                self.max_batch_tokens is not None and self.max_batch_tokens < 1,
                f"max_batch_tokens must be at least 1, not {self.max_batch_tokens}",
            ),
            (self.max_running < 1, f"max_running must be at least 1, not {self.max_running}"),
            (self.max_waiting < 1, f"max_waiting must be at least 1, not {self.max_waiting}"),
            (
                self.context_length is not None and self.context_length < 2,
                f"context_length must be at least 2 tokens, not {self.context_length}",
            ),
            (self.thread_count is not None and self.thread_count < 1, f"thread_count must be at least 1, not {self.thread_count}"),
            (not self.lease_s > 0, f"lease_s must be positive, not {self.lease_s}"),
        ]
        for is_wrong, message in wrong:
            if is_wrong:
                raise ConfigurationError(message)
