"""The command line, the options file and the environment of `trtllm-serve`, and what its output says of its state.

Source: TensorRT-LLM's documentation of `trtllm-serve` and its `LlmArgs`; nothing here was run.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from polyphase.core.errors import ConfigurationError
from polyphase.engines.served.settings import ServerSettings
from polyphase.wire.cards import Role

EVENT_BUFFER = 65_536  # events between two questions
OPTIONS_FILE = "trtllm.yaml"


def base_command(settings: ServerSettings) -> list[str]:
    """Up to the model. Raises: ConfigurationError if there is no TensorRT-LLM to be found."""
    if settings.command is not None:
        return shlex.split(settings.command)
    if settings.python is not None:
        beside = Path(os.path.expanduser(settings.python)).parent / "trtllm-serve"
        if not beside.exists():
            raise ConfigurationError(f"there is no trtllm-serve beside --engine-python {settings.python}; name TensorRT-LLM's interpreter")
        return [str(beside)]
    program = shutil.which("trtllm-serve")
    if program is not None:
        return [program]
    raise ConfigurationError(
        "there is no trtllm-serve on the PATH; start inside of TensorRT-LLM's container, name its interpreter with --engine-python, "
        "or a running server with --attach http://127.0.0.1:8000"
    )


def serve_command(settings: ServerSettings, port: int, without: Collection[str] = ()) -> list[str]:
    """All of it. Raises: ConfigurationError."""
    given: dict[str, object] = {
        "--host": "127.0.0.1",
        "--port": port,
        "--backend": "pytorch",
        "--max_batch_size": settings.max_running,
        "--max_num_tokens": settings.max_batch_tokens,
        "--max_seq_len": settings.context_length,
        "--extra_llm_api_options": settings.folder / OPTIONS_FILE,
    }
    flags = [part for flag, value in given.items() if value is not None and flag not in without for part in (flag, str(value))]
    try:
        further = shlex.split(settings.arguments)
    except ValueError as error:
        raise ConfigurationError(f"--engine-args cannot be read as a shell would: {error}") from error
    return [*base_command(settings), settings.model, *flags, *further]


def options(settings: ServerSettings, kv_tokens: int | None) -> str:
    """The options file, YAML. Another file among --engine-args takes its place: then these are wanted there as well."""
    lines = [
        "enable_iter_perf_stats: true",
        "guided_decoding_backend: xgrammar",
        "kv_cache_config:",
        "  enable_block_reuse: true",
        f"  event_buffer_max_size: {EVENT_BUFFER}",
    ]
    if settings.block_size is not None:
        lines.append(f"  tokens_per_block: {settings.block_size}")
    if kv_tokens is not None:
        lines.append(f"  max_tokens: {kv_tokens}")
    if settings.dtype != "auto":
        lines.append(f"dtype: {settings.dtype}")
    if settings.role is not Role.BOTH:
        lines += ["cache_transceiver_config:", "  backend: DEFAULT"]
    if settings.role is Role.PREFILL:
        lines.append("disable_overlap_scheduler: true")  # Source: its guide to disaggregated serving, for context servers
    return "\n".join(lines) + "\n"


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """What it needs beyond ours; what the user has set stays."""
    wanted = {"PYTHONUNBUFFERED": "1"}
    return {name: value for name, value in wanted.items() if name not in inherited}


def progress_of(lines: Sequence[str]) -> str:
    """What it does, by what it said last."""
    for line in reversed(lines):
        for mark, phrase in _PHASES.items():
            if mark in line:
                return phrase
    return "it starts Python and imports torch"


_PHASES = {
    "Uvicorn running": "it opens its port",
    "Started server process": "it opens its port",
    "CUDA graph": "it captures CUDA graphs",
    "Autotuning": "it tunes its kernels",
    "KV cache": "it makes its KV cache",
    "Loading weights": "it loads the weights",
    "Prefetching": "it reads the weights",
    "TensorRT-LLM version": "it reads the model's configuration",
    "TensorRT LLM version": "it reads the model's configuration",
}
