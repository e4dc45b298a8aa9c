"""What a LoRA adapter's folder says of it, in the form that PEFT writes: `adapter_config.json` beside `adapter_model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyphase.core.errors import ModelLoadError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # Source: vLLM's choices for --max-lora-rank


def adapter_folder(name: str, folder: str) -> Path:
    """Raises: ModelLoadError if there is no adapter."""
    path = Path(folder).expanduser()
    missing = [file for file in (CONFIG, WEIGHTS) if not (path / file).is_file()]
    if missing:
        raise ModelLoadError(f"the folder {folder} of the LoRA adapter {name!r} holds no {missing[0]}; name one that PEFT has written")
    return path


def read_adapter_config(name: str, folder: Path) -> dict[str, Any]:
    """Raises: ModelLoadError."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{folder / CONFIG} of the LoRA adapter {name!r} cannot be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("r"), int) or config["r"] < 1:
        raise ModelLoadError(f"{folder / CONFIG} of the LoRA adapter {name!r} states no rank (r)")
    return config


def greatest_rank(adapters: Mapping[str, str]) -> int:
    """The least rank that a server may be started with so that all of them fit. Raises: ModelLoadError."""
    rank = max(_rank(read_adapter_config(name, adapter_folder(name, folder))) for name, folder in adapters.items())
    fitting = [choice for choice in _RANKS if choice >= rank]
    if not fitting:
        raise ModelLoadError(f"a LoRA adapter has rank {rank}; vLLM takes at most {_RANKS[-1]}")
    return fitting[0]


def _rank(config: Mapping[str, Any]) -> int:
    ranks: list[int] = [config["r"], *(config.get("rank_pattern") or {}).values()]
    return max(ranks)
