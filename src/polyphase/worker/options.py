"""Flags of `python -m polyphase.worker`, which the launcher writes and people may."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from polyphase.observe.logs import LEVELS
from polyphase.wire.cards import Role

DEFAULT_MAX_WAITING = 1024  # requests
DEFAULT_LEASE_S = 30.0


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine is told; `None` and `auto` leave the choice to it. The torch engine's settings say what each means."""

    model: str
    name: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    block_size: int | None = None
    kv_bytes: int | None = None
    max_batch_tokens: int | None = None
    max_running: int | None = None
    max_waiting: int = DEFAULT_MAX_WAITING
    context_length: int | None = None
    thread_count: int | None = None
    lease_s: float = DEFAULT_LEASE_S
    mock_model: str = "llama-3.1-8b"
    mock_accelerator: str = "h100"
    mock_speedup: float = 1.0
    adapters: Mapping[str, str] = field(default_factory=dict)  # LoRA: folder by name
    run_folder: Path = Path()  # of the deployment; private
    worker_id: str = ""
    attach: str | None = None  # the remaining ones are for engines that are servers of their own
    engine_python: str | None = None
    engine_command: str | None = None
    engine_args: str = ""
    engine_api_key_env: str | None = None  # the name of a variable, never the key
    role: Role = Role.BOTH  # at its start: engines that move KV themselves have to know whether they will


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """How other hosts reach this worker's blocks: not at all without an address."""

    address: str | None
    token_file: Path | None


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    run_folder: Path
    worker_id: str
    beside: tuple[str, ...]  # further workers of this process, each with an engine of its own
    role: Role
    engine: str
    engine_options: EngineOptions
    max_waiting_prefill_tokens: int | None
    drain_timeout_s: float
    log_level: str
    transfer: TransferOptions = field(default_factory=lambda: TransferOptions(None, None))
    labels: dict[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    group: str | None = None
    weight: float | None = None


def parse_options(arguments: Sequence[str]) -> WorkerOptions:
    """Raises: SystemExit with code 2 and a line on standard error if a flag is wrong; with code 0 after `--help`."""
    given = _parser().parse_args(arguments)
    given.role = Role(given.role)
    return WorkerOptions(
        run_folder=given.run_folder,
        worker_id=given.worker_id,
        beside=given.beside,
        role=given.role,
        engine=given.engine,
        engine_options=EngineOptions(**{field: getattr(given, field) for field in EngineOptions.__dataclass_fields__}),
        max_waiting_prefill_tokens=given.max_waiting_prefill_tokens,
        drain_timeout_s=given.drain_timeout_s,
        log_level=given.log_level,
        transfer=TransferOptions(given.transfer_address, given.transfer_token_file),
        labels=given.labels,
        aliases=given.aliases,
        group=given.group,
        weight=given.weight,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="polyphase.worker", description="Serve one model with one engine to the frontends of a run folder."
    )
    parser.add_argument("--run-folder", type=Path, required=True, help="private folder of the deployment; created if missing")
    parser.add_argument("--worker-id", required=True, help="name that outlives restarts, for example decode-0")
    parser.add_argument(
        "--beside",
        type=_names,
        default=(),
        metavar="IDS",
        help="names of further workers like it, divided by commas, that live in the same process; for engines that compute nothing",
    )
    parser.add_argument("--role", choices=[str(role) for role in Role], default="both", help="phases that it serves (default: both)")
    parser.add_argument("--engine", default="torch", help="torch, vllm, sglang, trtllm, openai, mock, or module:function (default: torch)")
    parser.add_argument("--drain-timeout-s", type=_seconds, default=30.0, help="time for running requests after SIGTERM (default: 30)")
    parser.add_argument(
        "--max-waiting-prefill-tokens",
        type=_count,
        metavar="TOKENS",
        help="prompt tokens that may wait; fresh requests beyond are refused (default: what 16 steps compute)",
    )
    parser.add_argument(
        "--labels", type=_labels, default={}, metavar="NAME=VALUE,…", help="where it stands, for routers, such as zone=eu-1,rack=7"
    )
    parser.add_argument("--aliases", type=_names, default=(), metavar="NAMES", help="further names of the model, divided by commas")
    parser.add_argument("--group", help="of workers that share a weight, and between which requests may be split (default: the engine)")
    parser.add_argument("--weight", type=_weight, help="of the group, for its share of the model's requests; 0: the reserve")
    parser.add_argument("--log-level", choices=LEVELS, default="info")
    transfer = parser.add_argument_group("transfer between hosts")
    transfer.add_argument(
        "--transfer-address",
        metavar="HOST:PORT",
        help="where workers on other hosts read blocks, port 0 for any; not encrypted (default: this host only)",
    )
    transfer.add_argument("--transfer-token-file", type=Path, help="a secret that workers of one deployment share; others are refused")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--model", required=True, help="folder with a checkpoint, or a name on the hub")
    engine.add_argument("--name", help="under which the model is served (default: the folder's or the hub's name)")
    engine.add_argument(
        "--lora", dest="adapters", type=_labels, default={}, metavar="NAME=FOLDER,…", help="LoRA adapters that are served beside the model"
    )
    engine.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    engine.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 (default: float32 on cpu, the checkpoint's on cuda)")
    engine.add_argument("--block-size", type=_count, help="tokens in a KV block (default: 16; that of vllm is its own)")
    engine.add_argument("--kv-bytes", type=_count, help="memory of the KV cache in bytes (default: what suits model and machine)")
    engine.add_argument("--max-batch-tokens", type=_count, help="tokens in a step (default: 512 on cpu, 2048 on cuda)")
    engine.add_argument("--max-running", type=_count, help="sequences in a step (default: 64; vllm: 256)")
    engine.add_argument(
        "--max-waiting", type=_count, default=DEFAULT_MAX_WAITING, help="requests that may wait; more are refused (default: 1024)"
    )
    engine.add_argument("--context-length", type=_count, help="tokens of prompt and output together (default: the model's)")
    engine.add_argument("--thread-count", type=_count, help="threads that compute (default: all cores, up to 8)")
    engine.add_argument("--lease-s", type=_seconds, default=DEFAULT_LEASE_S, help="how long handed-over blocks are kept (default: 30)")
    served = parser.add_argument_group("engines that are servers of their own")
    served.add_argument("--attach", metavar="URL", help="a server that runs already, such as http://127.0.0.1:8000; else one is started")
    served.add_argument("--engine-python", metavar="PROGRAM", help="interpreter of the environment in which the engine is installed")
    served.add_argument("--engine-command", metavar="COMMAND", help="in place of the engine's own, to which the flags are added")
    served.add_argument("--engine-args", default="", metavar="FLAGS", help="further flags of the engine's server, as in a shell")
    served.add_argument("--engine-api-key-env", metavar="NAME", help="environment variable that holds the API key of an attached server")
    mock = parser.add_argument_group("mock engine")
    mock.add_argument("--mock-model", default="llama-3.1-8b", help="the imagined model, a name or its figures (default: llama-3.1-8b)")
    mock.add_argument("--mock-accelerator", default="h100", help="what it runs on, such as h100, 4xh100 or figures (default: h100)")
    mock.add_argument("--mock-speedup", type=_factor, default=1.0, help="how much faster than that, inf for no time at all (default: 1)")
    return parser


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return count


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds from 0")
    return seconds


def _factor(text: str) -> float:
    factor = float(text)
    if not factor > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return factor


def _weight(text: str) -> float:
    weight = float(text)
    if not 0 <= weight < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0")
    return weight


def _labels(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    if any(not (name and value) for name, _, value in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE,NAME=VALUE")
    return {name: value for name, _, value in pairs}


# argparse shows these when the text is no number at all
_count.__name__, _seconds.__name__, _factor.__name__, _weight.__name__ = "whole number", "number of seconds", "number", "number"
