"""Makes the model card: all that a frontend needs to serve the model without seeing its files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.utils.hub import cached_file

from polyphase.core.errors import ModelLoadError


@dataclass(frozen=True, slots=True)
class TextFacts:
    """What the model's files say about text."""

    tokenizer_json: bytes
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None


def read_text_facts(model: str) -> TextFacts:
    """Raises: ModelLoadError if the model has no tokenizer that the `tokenizers` library can read."""
    location = str(Path(model).expanduser()) if Path(model).expanduser().exists() else model
    settings = _read_json(location, "tokenizer_config.json")
    return TextFacts(
        tokenizer_json=_read(location, "tokenizer.json") or _converted_tokenizer(model, location),
        chat_template=_chat_template(location, settings),
        bos_token=_token_text(settings.get("bos_token")),
        eos_token=_token_text(settings.get("eos_token")),
    )


def eos_token_ids(generation: GenerationConfig, config: PretrainedConfig) -> list[int]:
    """As `generate` sees them: those of the generation configuration, or else the model's."""
    for ids in (generation.eos_token_id, getattr(config, "eos_token_id", None)):
        if ids is not None:
            return [ids] if isinstance(ids, int) else [int(i) for i in ids]
    return []


def _read(location: str, name: str) -> bytes | None:
    path = cached_file(location, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    return Path(path).read_bytes() if path is not None else None


def _read_json(location: str, name: str) -> dict[str, Any]:
    data = _read(location, name)
    if data is None:
        return {}
    try:
        found = json.loads(data)
    except ValueError as error:
        raise ModelLoadError(f"{name} of {location} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelLoadError(f"{name} of {location} is not a JSON object")
    return found


def _converted_tokenizer(model: str, location: str) -> bytes:
    """For folders that have only a SentencePiece or BPE vocabulary, which transformers can turn into the form we want."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
        text: str = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # transformers raises whatever it likes
        raise ModelLoadError(f"{model} has no tokenizer.json, and none can be made of its other files") from error
    return text.encode()


def _chat_template(location: str, settings: dict[str, Any]) -> str | None:
    data = _read(location, "chat_template.jinja")
    if data is not None:
        return data.decode()
    template = settings.get("chat_template") or _read_json(location, "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token_text(token: object) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
