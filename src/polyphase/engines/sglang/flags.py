"""The command line and the environment of SGLang's server, and what its output says of its state. Source: SGLang 0.5.23."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from polyphase.core.errors import ConfigurationError
from polyphase.engines.served.launching import free_port, free_ports
from polyphase.engines.served.settings import ServerSettings
from polyphase.wire.cards import Role

EVENT_TOPIC = "kv-events"
DEFAULT_BLOCK_SIZE = 16  # SGLang's own is 1 on most accelerators, of which no router could keep an index
_MODULE = ("-m", "sglang.launch_server")

# What we would like and can do without.
OPTIONAL: dict[str, tuple[str, ...]] = {
    "--incremental-streaming-output": (),  # pieces of a stream hold what is new; else they grow with it
    "--enable-priority-scheduling": (),
    "--schedule-low-priority-values-first": (),
    "--disable-priority-preemption": (),  # what runs goes on; priorities are among those that wait
    "--log-level-http": ("warning",),  # its access log would hold little more than that we ask for its load
}


def base_command(settings: ServerSettings) -> list[str]:
    """Up to the flags. Raises: ConfigurationError if there is no SGLang to be found."""
    if settings.command is not None:
        return shlex.split(settings.command)
    if settings.python is not None:
        python = os.path.expanduser(settings.python)
        if shutil.which(python) is None:
            raise ConfigurationError(f"--engine-python {settings.python} is no program; name the python of SGLang's environment")
        return [python, *_MODULE]
    program = shutil.which("sglang")
    if program is not None and (beside := Path(program).parent / "python").exists():
        return [str(beside), *_MODULE]
    if importlib.util.find_spec("sglang") is not None:
        return [sys.executable, *_MODULE]
    raise ConfigurationError(
        "there is no sglang on the PATH; install SGLang (an environment of its own is best), and name its interpreter with "
        "--engine-python /path/to/venv/bin/python, or a running server with --attach http://127.0.0.1:30000"
    )


def serve_command(settings: ServerSettings, name: str, port: int, without: Collection[str] = (), kv_tokens: int | None = None) -> list[str]:
    """All of it. `without` are optional flags that this SGLang does not know. Raises: ConfigurationError."""
    further = further_arguments(settings)
    given: dict[str, object] = {
        "--model-path": settings.model,
        "--served-model-name": name,
        "--host": "127.0.0.1",
        "--port": port,
        "--page-size": settings.block_size or DEFAULT_BLOCK_SIZE,
        "--max-total-tokens": kv_tokens,
        "--context-length": settings.context_length,
        "--chunked-prefill-size": settings.max_batch_tokens,
        "--max-running-requests": settings.max_running,
        "--dtype": None if settings.dtype == "auto" else settings.dtype,
        "--device": settings.device.partition(":")[0] if settings.device != "auto" else None,
        "--disaggregation-mode": settings.role if settings.role is not Role.BOTH else None,
        "--disaggregation-bootstrap-port": free_port() if settings.role is Role.PREFILL else None,
        "--kv-events-config": json.dumps(event_config(settings.folder, rank_count(further))),
    }
    flags = [part for flag, value in given.items() if value is not None for part in (flag, str(value))]
    if settings.adapters:
        flags += ["--enable-lora", "--lora-paths", *(f"{name}={folder}" for name, folder in settings.adapters.items())]
    flags += [part for flag, values in OPTIONAL.items() if flag not in without for part in (flag, *values)]
    if settings.device == "cpu" and settings.role is not Role.BOTH:
        flags += ["--disaggregation-transfer-backend", "mooncake_tcp"]
        flags += ["--disaggregation-decode-retraction-backup", "cpu_tensor"] if settings.role is Role.DECODE else []
    return [*base_command(settings), *flags, *further]


def further_arguments(settings: ServerSettings) -> list[str]:
    """Raises: ConfigurationError."""
    try:
        return shlex.split(settings.arguments)
    except ValueError as error:
        raise ConfigurationError(f"--engine-args cannot be read as a shell would: {error}") from error


def value_of(arguments: Sequence[str], *flags: str) -> str | None:
    """Of the last of these flags, written `--flag value` or `--flag=value`."""
    for place in range(len(arguments) - 1, -1, -1):
        flag, equals, value = arguments[place].partition("=")
        if flag in flags:
            if equals:
                return value
            return arguments[place + 1] if place + 1 < len(arguments) else None
    return None


def api_key(settings: ServerSettings) -> str | None:
    """That a launched server is told among its flags, or else the given one."""
    return value_of(further_arguments(settings), "--api-key") or settings.api_key


def rank_count(arguments: Sequence[str]) -> int:
    """Data parallel."""
    told = value_of(arguments, "--dp-size", "--data-parallel-size", "--dp")
    return int(told) if told is not None and told.isdigit() else 1


def event_config(folder: Path, ranks: int) -> dict[str, object]:
    """Sockets in a private folder: what is cached is nobody else's business. Of several ranks, ports: SGLang wants to count them up."""
    config: dict[str, object] = {"publisher": "zmq", "topic": EVENT_TOPIC}
    if ranks == 1:
        return {**config, "endpoint": f"ipc://{folder}/events", "replay_endpoint": f"ipc://{folder}/replay"}
    first = free_ports(2 * ranks)
    return {
        **config,
        "bind": True,
        "endpoint": f"tcp://127.0.0.1:{first}",
        "replay_endpoint": f"tcp://127.0.0.1:{first + ranks}",
    }


def environment(settings: ServerSettings, inherited: Mapping[str, str]) -> dict[str, str]:
    """What it needs beyond ours; what the user has set stays."""
    wanted = {"SGLANG_HOST_IP": "127.0.0.1", "PYTHONUNBUFFERED": "1", "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}
    if settings.device == "cpu":
        wanted |= {"SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": "", "MC_FORCE_TCP": "1"}
    return {name: value for name, value in wanted.items() if name not in inherited}


_SAYS_IT_ENDS = ("SIGQUIT received", "Received sigquit from a child", "kill_process_tree called")
_CRASHED = re.compile(r"Subprocess (\w+) \(pid=\d+\) crashed with exit code (-?\d+)")


def last_words(line: str) -> str | None:
    """Whether SGLang says that it cannot go on, which it does six seconds before it has ended; see `ServerProcess`."""
    crashed = _CRASHED.search(line)
    if crashed is not None and int(crashed[2]) < 0:
        try:
            how = signal.Signals(-int(crashed[2])).name
        except ValueError:
            how = f"signal {-int(crashed[2])}"
        return f"its process {crashed[1]} was killed by {how}"
    return "" if crashed is not None or any(mark in line for mark in _SAYS_IT_ENDS) else None


def progress_of(lines: Sequence[str]) -> str:
    """What it does, by what it said last."""
    for line in reversed(lines):
        for mark, phrase in _PHASES.items():
            if mark in line:
                return phrase
    return "it starts Python and imports torch"


_PHASES = {
    "Uvicorn running": "it warms up",
    "Started server process": "it opens its port",
    "Capture cuda graph begin": "it captures CUDA graphs",
    "Capture CUDA graph begin": "it captures CUDA graphs",
    "max_total_num_tokens=": "it has made its KV cache",
    "KV Cache is allocated": "it has made its KV cache",
    "Load weight end": "it has loaded the weights and makes its KV cache",
    "Load weight begin": "it loads the weights",
    "Init torch distributed begin": "it starts its processes",
    "Init parallel begin": "it starts its processes",
    "server_args=": "it reads the model's configuration",
}
