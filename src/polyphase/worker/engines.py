"""Loads an engine by name; only the chosen one is imported."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict
from typing import cast

from polyphase.core.errors import ConfigurationError
from polyphase.engines.interface import Engine, KvExporter
from polyphase.worker.options import EngineOptions


def load_engine(name: str, options: EngineOptions) -> Engine:
    """Load the model and allocate what the engine needs.

    Args:
        name: `torch`, or `module:function` of a function that takes `EngineOptions` and returns an engine.

    Raises: ConfigurationError (ModelLoadError for the model's faults).
    Owner: the caller closes the engine.
    """
    if name == "torch":
        return _load_torch(options)
    if ":" in name:
        return _foreign_loader(name)(options)
    raise ConfigurationError(f"there is no engine {name!r}; use torch, or module:function of an engine's loader")


def _load_torch(options: EngineOptions) -> Engine:
    try:
        from polyphase.engines.torch import TorchSettings, load_torch_engine

        engine: Engine = load_torch_engine(TorchSettings(**asdict(options)))
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"the torch engine needs the package {error.name!r}, which is not installed; install it with: pip install 'polyphase[torch]'"
        ) from error
    return engine


def _foreign_loader(name: str) -> Callable[[EngineOptions], Engine]:
    module_name, _, function_name = name.partition(":")
    try:
        loader = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"the engine loader {name!r} cannot be imported: {error}") from error
    return cast("Callable[[EngineOptions], Engine]", loader)


def kv_exporter(engine: Engine) -> KvExporter | None:
    """The engine's ability to hand blocks over, if its card says that it has it."""
    return cast("KvExporter", engine) if engine.card.can_hand_over else None
