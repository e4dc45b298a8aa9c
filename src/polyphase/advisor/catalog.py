"""The models and accelerators that come with Polyphase, and those that a user adds: the advisor's one reader of files.

Everything else in this plane gets values. What a user adds is text that a composition root has read: a model as `config.json` or as a
file of the form shipped here, an accelerator as TOML.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

from polyphase.advisor.accelerators import Accelerator, accelerator_from_table
from polyphase.advisor.calibration import Calibration, from_json
from polyphase.advisor.model_config import shape_from_config
from polyphase.advisor.naming import unknown
from polyphase.advisor.shapes import ModelShape
from polyphase.core.errors import ConfigurationError

_DATA = files("polyphase.advisor") / "data"


@dataclass(frozen=True, slots=True)
class Library:
    """Names are compared without case; a model is also found by its names on the hub."""

    models: Mapping[str, ModelShape]
    accelerators: Mapping[str, Accelerator]
    hub_names: Mapping[str, str] = field(default_factory=dict)  # hub name -> name of the model

    def model(self, name: str) -> ModelShape:
        """Raises: ConfigurationError with the nearest names."""
        key = name.strip().lower()
        named = {hub.lower(): own for hub, own in self.hub_names.items()}
        shape = self.models.get(named.get(key, key)) or self._variant(key)
        if shape is None:
            raise unknown("model", name, [*self.models, *self.hub_names], "A folder with its config.json will do as well.")
        return shape

    def _variant(self, key: str) -> ModelShape | None:
        """Quantised and tuned variants of a known model, whoever made them: `acme/DeepSeek-R1-0528-FP4-v2` is as large as DeepSeek-R1."""
        if "/" not in key:
            return None
        plain = {_plain(hub): own for hub, own in self.hub_names.items()} | {own: own for own in self.models}
        return self.models.get(plain.get(_plain(key), ""))

    def accelerator(self, name: str) -> Accelerator:
        """Raises: ConfigurationError with the nearest names."""
        key = name.strip().lower()
        for accelerator in self.accelerators.values():
            if key == accelerator.name or key in accelerator.aliases:
                return accelerator
        raise unknown("accelerator", name, self.accelerators, "A datasheet of your own can be given as a file.")

    def with_model(self, shape: ModelShape) -> Library:
        return Library({**self.models, shape.name.lower(): shape}, self.accelerators, self.hub_names)

    def with_accelerator(self, accelerator: Accelerator) -> Library:
        return Library(self.models, {**self.accelerators, accelerator.name: accelerator}, self.hub_names)


_VARIANT = re.compile(r"-(fp8|fp4|nvfp4|mxfp4|mxfp8|bf16|int4|int8|awq|gptq|w4a16|w8a8|instruct|chat|it|base|dynamic|block|\d{4}|v\d)$")


def _plain(hub_name: str) -> str:
    name = hub_name.lower().rpartition("/")[2]
    while (shorter := _VARIANT.sub("", name)) != name:
        name = shorter
    return name


@cache
def shipped_calibration() -> Calibration:
    """What was learned from the published measurements; its provenance says which."""
    return from_json((_DATA / "calibration.json").read_text(), "the calibration that comes with Polyphase")


@cache
def shipped_library() -> Library:
    models: dict[str, ModelShape] = {}
    hub_names: dict[str, str] = {}
    for entry in (_DATA / "models").iterdir():
        if entry.name.endswith(".json"):
            content = json.loads(entry.read_text())
            models[content["name"]] = shape_from_config(content["config"], content["name"])
            hub_names |= dict.fromkeys(content["hub_names"], content["name"])
    sheets = [entry for entry in (_DATA / "accelerators").iterdir() if entry.name.endswith(".toml")]
    accelerators = [accelerator_from_table(tomllib.loads(entry.read_text()), entry.name) for entry in sheets]
    return Library(models, {accelerator.name: accelerator for accelerator in accelerators}, hub_names)


def model_from_text(text: str, where: str, name: str) -> ModelShape:
    """A `config.json`, or a file of the form `{"name": …, "config": {…}}`. Raises: ConfigurationError."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ConfigurationError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigurationError(f"{where} holds no JSON object")
    inner = content.get("config")
    if isinstance(inner, dict):
        return shape_from_config(inner, str(content.get("name", name)))
    return shape_from_config(content, name)


def accelerator_from_text(text: str, where: str) -> Accelerator:
    """A datasheet in TOML. Raises: ConfigurationError."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{where} is not valid TOML: {error}") from None
    return accelerator_from_table(table, where)
