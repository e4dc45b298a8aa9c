"""Reads what the model card says of text out of the model's files, with the hub's library where they are not in a folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.utils.hub import cached_file

from polyphase.core.errors import ModelLoadError
from polyphase.engines.text_files import TextFacts, as_token_ids, text_facts


def read_text_facts(model: str) -> TextFacts:
    """Raises: ModelLoadError if the model has no tokenizer that the `tokenizers` library can read."""
    location = str(Path(model).expanduser()) if Path(model).expanduser().exists() else model
    read = partial(_read, location)
    return text_facts(location, read, read("tokenizer.json") or _converted_tokenizer(model, location))


def eos_token_ids(generation: GenerationConfig, config: PretrainedConfig) -> list[int]:
    """As `generate` sees them: those of the generation configuration, or else the model's."""
    for ids in (generation.eos_token_id, getattr(config, "eos_token_id", None)):
        if (found := as_token_ids(ids)) is not None:
            return found
    return []


def _read(location: str, name: str) -> bytes | None:
    path = cached_file(location, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    return Path(path).read_bytes() if path is not None else None


def _converted_tokenizer(model: str, location: str) -> bytes:
    """For folders that have only a SentencePiece or BPE vocabulary, which transformers can turn into the form we want."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
        text: str = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # transformers raises whatever it likes
        raise ModelLoadError(f"{model} has no tokenizer.json, and none can be made of its other files") from error
    return text.encode()
