"""The command line and the environment of `vllm serve`. Source: vLLM 0.32.0, and its `unrecognized arguments` for versions that differ."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from polyphase.core.errors import ConfigurationError
from polyphase.engines.adapter_files import greatest_rank
from polyphase.engines.vllm.hand_over import connector_config, connector_environment, has_accelerator, is_for_want_of_nixl
from polyphase.engines.vllm.settings import VllmSettings

EVENT_TOPIC = "kv-events"
ANY_PORT = "tcp://*:0"
CONNECTOR = "--kv-transfer-config"
CHECKED_SHARE = 0.05  # of the accelerator's memory: all that a server with a cache of a given size has to find free when it starts
DEFAULT_CONTEXTS = 16  # whole contexts that the cache holds on a CPU, unless memory is short
HOST_SHARE = 0.2  # of the memory that is available: there may be other workers on this machine
DEFAULT_MAX_RUNNING = 256  # Source: vLLM's for servers on most accelerators; given, so that the card is true

# What we would like and can do without.
OPTIONAL = {
    "--enable-scale-out": (),  # token-in/token-out; without it, completions with token ids
    "--enable-prompt-tokens-details": (),  # cached tokens of each request
    "--scheduling-policy": ("priority",),
    "--disable-uvicorn-access-log": (),  # it would hold little more than that we ask for its metrics
}
_UTILIZATION = "--gpu-memory-utilization"
_KV_BYTES = "--kv-cache-memory-bytes"
_UNKNOWN = re.compile(r"unrecognized arguments: (.+)")


def base_command(settings: VllmSettings) -> list[str]:
    """Up to and including `serve`. Raises: ConfigurationError if there is no vLLM to be found."""
    if settings.command is not None:
        return shlex.split(settings.command)
    if settings.python is not None:
        python = os.path.expanduser(settings.python)
        if shutil.which(python) is None:
            raise ConfigurationError(f"--engine-python {settings.python} is no program; name the python of vLLM's environment")
        return [python, "-m", "vllm.entrypoints.cli.main", "serve"]
    program = shutil.which("vllm")
    if program is not None:
        return [program, "serve"]
    if importlib.util.find_spec("vllm") is not None:
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    raise ConfigurationError(
        "there is no vllm command on the PATH; install vLLM (an environment of its own is best), and name its interpreter with "
        "--engine-python /path/to/venv/bin/python, or a running server with --attach http://127.0.0.1:8000"
    )


def serve_command(settings: VllmSettings, name: str, port: int, without: Collection[str] = ()) -> list[str]:
    """All of it. `without`: optional flags, those that this vLLM does not know or cannot use. Raises: ConfigurationError."""
    further = further_arguments(settings)
    has_connector = settings.hands_over and CONNECTOR not in without and not _names(further, CONNECTOR)
    kv_bytes = settings.kv_bytes if _KV_BYTES not in without else None
    given: dict[str, object] = {
        "--served-model-name": name,
        "--host": "127.0.0.1",
        "--port": port,
        "--max-num-seqs": settings.max_running or DEFAULT_MAX_RUNNING,
        "--kv-events-config": json.dumps(event_config(settings.folder, has_ranks=rank_count(further) > 1)),
        CONNECTOR: json.dumps(connector_config(is_on_cpu=is_on_cpu(settings))) if has_connector else None,
        "--block-size": settings.block_size,
        _KV_BYTES: kv_bytes,
        # Of no account for a cache of a given size, but checked, and then nobody else could be on the accelerator.
        _UTILIZATION: CHECKED_SHARE if kv_bytes and not _names(further, _UTILIZATION) else None,
        "--max-model-len": settings.context_length,
        "--max-num-batched-tokens": settings.max_batch_tokens,
        "--dtype": None if settings.dtype == "auto" else settings.dtype,
    }
    flags = [part for flag, value in given.items() if value is not None for part in (flag, str(value))]
    if settings.adapters:
        flags += ["--enable-lora", "--max-lora-rank", str(greatest_rank(settings.adapters))]
        flags += ["--lora-modules", *(f"{name}={folder}" for name, folder in settings.adapters.items())]
    flags += [part for flag, values in OPTIONAL.items() if flag not in without for part in (flag, *values)]
    return [*base_command(settings), settings.model, *flags, *further]


def further_arguments(settings: VllmSettings) -> list[str]:
    """Raises: ConfigurationError."""
    try:
        return shlex.split(settings.arguments)
    except ValueError as error:
        raise ConfigurationError(f"--engine-args cannot be read as a shell would: {error}") from error


def event_config(folder: Path, *, has_ranks: bool = False) -> dict[str, object]:
    """Sockets in a private folder: of TCP endpoints, vLLM binds only those that listen on all interfaces.

    Of several ranks each needs its own, which vLLM makes of TCP endpoints only: any port, on the node's address, which is loopback here.
    """
    return {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": ANY_PORT if has_ranks else f"ipc://{folder}/events",
        "replay_endpoint": ANY_PORT if has_ranks else f"ipc://{folder}/replay",
        "topic": EVENT_TOPIC,
    }


def rank_count(arguments: Sequence[str]) -> int:
    """Data-parallel ranks that the server's own flags ask for."""
    for place, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag in ("--data-parallel-size", "-dp"):
            value = value or (arguments[place + 1] if place + 1 < len(arguments) else "")
            return int(value) if value.isdigit() else 1
    return 1


def is_on_cpu(settings: VllmSettings) -> bool:
    return settings.device == "cpu" or (settings.device == "auto" and not has_accelerator())


def host_kv_bytes(settings: VllmSettings, context_bytes: int, available_bytes: int | None, inherited: Mapping[str, str]) -> int | None:
    """For a cache in host memory of which nobody has said how large it is. `context_bytes`: of a whole context, 0 if not known.

    vLLM itself would take 92 % of the memory, and not start where so much is not free; for two servers on a machine it never is.

    Raises: ConfigurationError if the further flags cannot be read.
    """
    is_said = "VLLM_CPU_KVCACHE_SPACE" in inherited or _names(further_arguments(settings), _UTILIZATION, _KV_BYTES)
    if settings.kv_bytes or is_said or available_bytes is None or not is_on_cpu(settings):
        return settings.kv_bytes
    limit = int(available_bytes * HOST_SHARE)
    return min(limit, DEFAULT_CONTEXTS * context_bytes) if context_bytes else limit


def _names(arguments: Sequence[str], *flags: str) -> bool:
    return any(argument.partition("=")[0] in flags for argument in arguments)


def environment(settings: VllmSettings, inherited: Mapping[str, str]) -> dict[str, str]:
    """What it needs beyond ours; what the user has set stays."""
    wanted = {"VLLM_HOST_IP": "127.0.0.1", "PYTHONUNBUFFERED": "1"}
    if settings.device in ("cpu", "auto"):
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else each worker takes the same cores; without meaning on accelerators
    if settings.hands_over:
        wanted |= connector_environment(is_on_cpu=is_on_cpu(settings))
    if "--enable-sleep-mode" in settings.arguments:
        wanted["VLLM_SERVER_DEV_MODE"] = "1"  # else nobody can tell it to sleep
    if settings.api_key is not None:
        wanted["VLLM_API_KEY"] = settings.api_key  # not on the command line, which everybody can read
    return {name: value for name, value in wanted.items() if name not in inherited}


def unusable_flags(lines: Sequence[str]) -> set[str]:
    """Flags of ours that a server which ended had complained of, and that it can do without."""
    said = {word for line in lines if (found := _UNKNOWN.search(line)) for word in found[1].split()}
    return (said & {*OPTIONAL, CONNECTOR, _KV_BYTES}) | ({CONNECTOR} if is_for_want_of_nixl(lines) else set())


def progress_of(lines: Sequence[str]) -> str:
    """What it does, by what it said last."""
    for line in reversed(lines):
        for mark, phrase in _PHASES.items():
            if mark in line:
                return phrase
    return "it starts Python and imports torch"


_PHASES = {
    "Starting vLLM server": "it opens its port",
    "Capturing CUDA graph": "it captures CUDA graphs",
    "Dynamo bytecode transform": "it compiles the model",
    "Compiling a graph": "it compiles the model",
    "init engine": "it warms up",
    "KV cache size": "it has made its KV cache and warms up",
    "Loading weights took": "it has loaded the weights and measures the memory for KV",
    "Loading safetensors": "it loads the weights",
    "Starting to load model": "it loads the model",
    "Initializing a V1 LLM engine": "it starts its engine process",
    "Resolved architecture": "it has read the model's configuration",
    "non-default args": "it reads the model's configuration",
}
