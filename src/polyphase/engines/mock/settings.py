"""What a person may choose about the mock engine."""

from __future__ import annotations

from dataclasses import dataclass

from polyphase.core.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class MockSettings:
    model: str  # a folder, whose tokenizer and chat template are used; weights need not be there
    name: str | None = None  # under which it is served; None: the folder's name
    shape: str = "llama-3.1-8b"  # the model that is imagined: see `imagined.imagine`
    accelerator: str = "h100"  # and what it runs on
    speedup: float = 1.0  # how much faster than that; infinite: steps take no time
    block_size: int = 16  # tokens
    kv_bytes: int | None = None  # of the imagined memory; None: what the weights leave
    max_batch_tokens: int | None = None  # of one step; None: 8,192
    max_running: int = 64  # sequences that share a step
    max_waiting: int = 1024  # requests beyond these are refused
    context_length: int | None = None  # None: the imagined model's, or what the KV cache can hold
    lease_s: float = 30.0  # how long blocks are kept for whoever was offered them
    adapters: tuple[str, ...] = ()  # names of imagined LoRA adapters: with each, the answers are others

    def __post_init__(self) -> None:
        if not self.speedup > 0:
            raise ConfigurationError(f"mock-speedup must be a positive number or inf, not {self.speedup}")
        if self.block_size < 1:
            raise ConfigurationError(f"block_size must be at least 1 token, not {self.block_size}")
        if not self.lease_s > 0:
            raise ConfigurationError(f"lease_s must be positive, not {self.lease_s}")
