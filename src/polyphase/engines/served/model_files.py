"""The files of a model beside its weights, from a folder or the hub's cache, and what a model card says of them; without torch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyphase.core.errors import ConfigurationError, ModelLoadError
from polyphase.engines.text_files import ReadFile, TextFacts, as_token_ids, read_json, text_facts
from polyphase.text import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    text: TextFacts
    tokenizer: Tokenizer
    vocab_size: int
    eos_token_ids: list[int]
    context_length: int | None  # as the configuration has it; None: it does not say
    kv_bytes_per_token: int  # with keys and values of two bytes; 0: the configuration does not say
    generation: dict[str, Any]  # generation_config.json
    dtype: str = ""  # of the weights; empty: the configuration does not say

    @property
    def bos_token_id(self) -> int | None:
        return self.tokenizer.token_id(self.text.bos_token) if self.text.bos_token else None


def read_model_facts(model: str) -> ModelFacts:
    """Raises: ModelLoadError if there is no tokenizer.json, or a file is broken."""
    read = reader_of(model)
    tokenizer_json = read("tokenizer.json")
    if tokenizer_json is None:
        raise ModelLoadError(f"{model} has no tokenizer.json that can be read here; the frontend needs it to turn text into tokens")
    try:
        tokenizer = Tokenizer.from_json(tokenizer_json)
    except ConfigurationError as error:
        raise ModelLoadError(f"the tokenizer of {model} cannot be used: {error.message}") from error
    generation = read_json(model, read, "generation_config.json")
    whole = read_json(model, read, "config.json")
    nested = whole.get("text_config")  # of models that also see or hear
    config = {**whole, **nested} if isinstance(nested, dict) else whole
    return ModelFacts(
        text=text_facts(model, read, tokenizer_json),
        tokenizer=tokenizer,
        vocab_size=max(tokenizer.vocab_size, _whole(config.get("vocab_size"))),
        eos_token_ids=as_token_ids(generation.get("eos_token_id")) or as_token_ids(config.get("eos_token_id")) or [],
        context_length=_whole(config.get("max_position_embeddings")) or None,
        kv_bytes_per_token=_kv_bytes_per_token(config),
        generation=generation,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or ""),
    )


def reader_of(model: str) -> ReadFile:
    """Raises: ModelLoadError if `model` is a name on the hub, and its library is not installed."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return lambda name: (folder / name).read_bytes() if (folder / name).is_file() else None
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise ModelLoadError(
            f"{model} is no folder here, and to read a model of the hub the package huggingface-hub is needed: pip install huggingface-hub"
        ) from error
    return _hub_reader(model, huggingface_hub.hf_hub_download)


def _hub_reader(model: str, download: Callable[..., str]) -> ReadFile:
    def read(name: str) -> bytes | None:
        try:
            return Path(download(model, name)).read_bytes()
        except Exception as error:  # noqa: BLE001  the library raises whatever it likes for what is not there, or not reachable
            log.debug("%s of %s: %s", name, model, error)
            return None

    return read


def _kv_bytes_per_token(config: dict[str, Any]) -> int:
    heads = _whole(config.get("num_attention_heads"))
    kv_heads = _whole(config.get("num_key_value_heads")) or heads
    head_dim = _whole(config.get("head_dim")) or (_whole(config.get("hidden_size")) // heads if heads else 0)
    return _whole(config.get("num_hidden_layers")) * 2 * kv_heads * head_dim * 2


def _whole(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
