"""What a model's files say about text, from wherever they are read: a folder, or a hub's cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from polyphase.core.errors import ModelLoadError

ReadFile = Callable[[str], bytes | None]
"""Content of the model's file of this name; None if there is none."""


@dataclass(frozen=True, slots=True)
class TextFacts:
    tokenizer_json: bytes
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None


def text_facts(model: str, read: ReadFile, tokenizer_json: bytes) -> TextFacts:
    """Raises: ModelLoadError if a file is broken."""
    settings = read_json(model, read, "tokenizer_config.json")
    return TextFacts(
        tokenizer_json=tokenizer_json,
        chat_template=_chat_template(model, read, settings),
        bos_token=_token_text(settings.get("bos_token")),
        eos_token=_token_text(settings.get("eos_token")),
    )


def read_json(model: str, read: ReadFile, name: str) -> dict[str, Any]:
    """Empty if there is no such file. Raises: ModelLoadError."""
    data = read(name)
    if data is None:
        return {}
    try:
        found = json.loads(data)
    except ValueError as error:
        raise ModelLoadError(f"{name} of {model} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelLoadError(f"{name} of {model} is not a JSON object")
    return found


def as_token_ids(ids: object) -> list[int] | None:
    """One id or a list of them, as configurations have it; None if nothing is said."""
    if ids is None:
        return None
    return [ids] if isinstance(ids, int) else [int(i) for i in ids] if isinstance(ids, list | tuple) else None


def _chat_template(model: str, read: ReadFile, settings: dict[str, Any]) -> str | None:
    data = read("chat_template.jinja")
    if data is not None:
        return data.decode()
    template = settings.get("chat_template") or read_json(model, read, "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token_text(token: object) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
