"""Loads an engine by name; only the chosen one is imported."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import TYPE_CHECKING, cast

from polyphase.core.errors import ConfigurationError
from polyphase.engines.interface import Engine, Forwarder, KvExporter, KvImporter, KvSender, Sleeper
from polyphase.wire.cards import BLOCKS, Role
from polyphase.worker.options import EngineOptions

if TYPE_CHECKING:
    from polyphase.engines.served.settings import ServerSettings

BLOCK_SIZE = 16  # tokens, of engines of our own
MAX_RUNNING = 64


def load_engines(name: str, options: EngineOptions) -> list[Engine]:
    """Load the model and allocate what the engine needs. Several, where one server has data-parallel ranks: each is a worker of its own.

    Args:
        name: `torch`, `vllm`, `sglang`, `trtllm`, `openai`, `mock`, or `module:function` of a function that makes one of `EngineOptions`.

    Raises: ConfigurationError (ModelLoadError for the model's faults).
    Owner: the caller closes the engines.
    """
    if name == "torch":
        return [_load_torch(options)]
    if name == "mock":
        return [_load_mock(options)]
    if name == "vllm":
        return _load_vllm(options)
    if name == "sglang":
        return _load_sglang(options)
    if name == "trtllm":
        return [_load_trtllm(options)]
    if name == "openai":
        return [_load_openai(options)]
    if ":" in name:
        return [_foreign_loader(name)(options)]
    raise ConfigurationError(f"there is no engine {name!r}; use torch, vllm, sglang, trtllm, openai, mock, or module:function")


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
            adapters=tuple(options.adapters),
        )
    )


def _load_vllm(options: EngineOptions) -> list[Engine]:
    from polyphase.engines.served.secrets import api_key_of
    from polyphase.engines.vllm import VllmSettings
    from polyphase.engines.vllm.assembly import load_vllm_engines

    settings = VllmSettings(
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
        adapters=options.adapters,
        hands_over=options.role is not Role.BOTH,
        api_key=api_key_of(os.environ),
    )
    return list(load_vllm_engines(settings))


def _load_openai(options: EngineOptions) -> Engine:
    from polyphase.engines.openai import OpenAISettings
    from polyphase.engines.openai.assembly import load_openai_engine

    return load_openai_engine(
        OpenAISettings(
            model=options.model,
            name=options.name,
            url=options.attach,
            key_variable=options.engine_api_key_env,
            context_length=options.context_length,
            max_running=options.max_running,
            max_batch_tokens=options.max_batch_tokens,
            environment=os.environ,
        )
    )


def _load_sglang(options: EngineOptions) -> list[Engine]:
    from polyphase.engines.sglang.assembly import load_sglang_engines

    return list(load_sglang_engines(_server_settings(options)))


def _load_trtllm(options: EngineOptions) -> Engine:
    from polyphase.engines.trtllm.assembly import load_trtllm_engine

    return load_trtllm_engine(_server_settings(options))


def _server_settings(options: EngineOptions) -> ServerSettings:
    from polyphase.engines.served.secrets import api_key_of
    from polyphase.engines.served.settings import ServerSettings

    return ServerSettings(
        model=options.model,
        name=options.name,
        folder=options.run_folder / "engines" / options.worker_id,
        attach=options.attach,
        python=options.engine_python,
        command=options.engine_command,
        arguments=options.engine_args,
        role=options.role,
        adapters=options.adapters,
        device=options.device,
        dtype=options.dtype,
        block_size=options.block_size,
        kv_bytes=options.kv_bytes,
        context_length=options.context_length,
        max_batch_tokens=options.max_batch_tokens,
        max_running=options.max_running,
        api_key=api_key_of(os.environ),
    )


def _foreign_loader(name: str) -> Callable[[EngineOptions], Engine]:
    module_name, _, function_name = name.partition(":")
    try:
        loader = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"the engine loader {name!r} cannot be imported: {error}") from error
    return cast("Callable[[EngineOptions], Engine]", loader)


def check_adapters(engine: Engine, name: str, wanted: Collection[str]) -> None:
    """Raises: ConfigurationError if the engine has not taken the LoRA adapters that it was told of."""
    missing = sorted(set(wanted) - set(engine.card.adapters))
    if missing:
        raise ConfigurationError(
            f"the engine {name} did not take the LoRA adapter {missing[0]!r}; leave --lora away, or take torch, vllm or sglang"
        )


def kv_exporter(engine: Engine) -> KvExporter | None:
    """The engine's ability to hand blocks over, if its card says that it has it."""
    card = engine.card
    return cast("KvExporter", engine) if card.can_hand_over and card.offer_kind == BLOCKS else None


def kv_sender(engine: Engine) -> KvSender | None:
    """The engine's ability to bring KV to others of its kind, if its card says that it has it."""
    card = engine.card
    return cast("KvSender", engine) if card.can_hand_over and card.offer_kind != BLOCKS else None


def sleeper(engine: Engine) -> Sleeper | None:
    return cast("Sleeper", engine) if engine.card.can_sleep else None


def forwarder(engine: Engine) -> Forwarder | None:
    """The engine's ability to take bodies, if its card says that it has it."""
    return cast("Forwarder", engine) if engine.card.passes else None


def kv_importer(engine: Engine) -> KvImporter | None:
    """The engine's ability to take blocks in beside its steps."""
    return engine if isinstance(engine, KvImporter) else None
