"""Loads an engine by name; only the chosen one is imported."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import fields
from typing import cast

from polyphase.core.errors import ConfigurationError
from polyphase.engines.interface import Engine, KvExporter, KvImporter, KvSender
from polyphase.wire.cards import BLOCKS, Role
from polyphase.worker.options import EngineOptions

BLOCK_SIZE = 16  # tokens, of engines of our own
MAX_RUNNING = 64


def load_engine(name: str, options: EngineOptions) -> Engine:
    """Load the model and allocate what the engine needs.

    Args:
        name: `torch`, `vllm`, `sglang`, `mock`, or `module:function` of a function that takes `EngineOptions` and returns an engine.

    Raises: ConfigurationError (ModelLoadError for the model's faults).
    Owner: the caller closes the engine.
    """
    if name == "torch":
        return _load_torch(options)
    if name == "mock":
        return _load_mock(options)
    if name == "vllm":
        return _load_vllm(options)
    if name == "sglang":
        return _load_sglang(options)
    if ":" in name:
        return _foreign_loader(name)(options)
    raise ConfigurationError(f"there is no engine {name!r}; use torch, vllm, sglang, mock, or module:function of an engine's loader")


def _load_torch(options: EngineOptions) -> Engine:
    try:
        from polyphase.engines.torch import TorchSettings, load_torch_engine

        told = {field.name: getattr(options, field.name) for field in fields(TorchSettings)}
        wanted = {**told, "block_size": options.block_size or BLOCK_SIZE, "max_running": options.max_running or MAX_RUNNING}
        engine: Engine = load_torch_engine(TorchSettings(**wanted))
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"the torch engine needs the package {error.name!r}, which is not installed; install it with: pip install 'polyphase[torch]'"
        ) from error
    return engine


def _load_mock(options: EngineOptions) -> Engine:
    from polyphase.engines.mock import MockSettings
    from polyphase.engines.mock.engine import load_mock_engine

    return load_mock_engine(
        MockSettings(
            model=options.model,
            name=options.name,
            shape=options.mock_model,
            accelerator=options.mock_accelerator,
            speedup=options.mock_speedup,
            block_size=options.block_size or BLOCK_SIZE,
            kv_bytes=options.kv_bytes,
            max_batch_tokens=options.max_batch_tokens,
            max_running=options.max_running or MAX_RUNNING,
            max_waiting=options.max_waiting,
            context_length=options.context_length,
            lease_s=options.lease_s,
        )
    )


def _load_vllm(options: EngineOptions) -> Engine:
    from polyphase.engines.vllm import VllmSettings
    from polyphase.engines.vllm.assembly import load_vllm_engine

    return load_vllm_engine(
        VllmSettings(
            model=options.model,
            name=options.name,
            folder=options.run_folder / "engines" / options.worker_id,
            attach=options.attach,
            python=options.engine_python,
            command=options.engine_command,
            arguments=options.engine_args,
            device=options.device,
            dtype=options.dtype,
            block_size=options.block_size,
            kv_bytes=options.kv_bytes,
            context_length=options.context_length,
            max_batch_tokens=options.max_batch_tokens,
            max_running=options.max_running,
        )
    )


def _load_sglang(options: EngineOptions) -> Engine:
    from polyphase.engines.served.settings import ServerSettings
    from polyphase.engines.sglang.assembly import load_sglang_engine

    return load_sglang_engine(
        ServerSettings(
            model=options.model,
            name=options.name,
            folder=options.run_folder / "engines" / options.worker_id,
            attach=options.attach,
            python=options.engine_python,
            command=options.engine_command,
            arguments=options.engine_args,
            role=Role(options.role),
            device=options.device,
            dtype=options.dtype,
            block_size=options.block_size,
            kv_bytes=options.kv_bytes,
            context_length=options.context_length,
            max_batch_tokens=options.max_batch_tokens,
            max_running=options.max_running,
        )
    )


def _foreign_loader(name: str) -> Callable[[EngineOptions], Engine]:
    module_name, _, function_name = name.partition(":")
    try:
        loader = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"the engine loader {name!r} cannot be imported: {error}") from error
    return cast("Callable[[EngineOptions], Engine]", loader)


def kv_exporter(engine: Engine) -> KvExporter | None:
    """The engine's ability to hand blocks over, if its card says that it has it."""
    card = engine.card
    return cast("KvExporter", engine) if card.can_hand_over and card.offer_kind == BLOCKS else None


def kv_sender(engine: Engine) -> KvSender | None:
    """The engine's ability to bring KV to others of its kind, if its card says that it has it."""
    card = engine.card
    return cast("KvSender", engine) if card.can_hand_over and card.offer_kind != BLOCKS else None


def kv_importer(engine: Engine) -> KvImporter | None:
    """The engine's ability to take blocks in beside its steps."""
    return engine if isinstance(engine, KvImporter) else None
