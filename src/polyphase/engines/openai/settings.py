"""What a worker before an OpenAI-compatible server is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

DEFAULT_KEY_VARIABLE = "POLYPHASE_ENGINE_API_KEY"


@dataclass(frozen=True, slots=True)
class OpenAISettings:
    model: str  # what the server calls it, or a folder with its tokenizer
    name: str | None  # under which it is served
    url: str | None
    key_variable: str | None = None  # environment variable that holds the API key; None: the default one, if it is set
    context_length: int | None = None
    max_running: int | None = None
    max_batch_tokens: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
