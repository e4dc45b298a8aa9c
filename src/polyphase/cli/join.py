"""`polyphase join`: the flags of `serve` that concern workers, for workers that join a deployment which runs."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

import typer

_FURTHER = ("start_timeout", "drain_timeout")
_MODEL = inspect.Parameter(
    "model",
    inspect.Parameter.KEYWORD_ONLY,
    annotation=Annotated[str, typer.Argument(help="A folder, a name on the Hugging Face hub (Qwen/Qwen3-0.6B), or demo.")],
)
_NAME = inspect.Parameter(
    "name",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[str | None, typer.Option("--name", help="Which deployment, where several run on this machine.")],
)
HELP = """Add workers to a running deployment: of another model, another engine, or more of the same.

They leave when this ends. Example: polyphase join Qwen/Qwen3-0.6B --engine vllm --attach http://127.0.0.1:9000
"""


def join_command(serve: Callable[..., None], panels: Collection[str]) -> Callable[..., None]:
    """The command, with those of the flags of `serve` that are for workers: they stand in these panels."""
    of_serve = inspect.signature(serve, eval_str=True).parameters
    chosen = [each for name, each in of_serve.items() if name in _FURTHER or (name != "name" and _panel(each) in panels)]
    required = [_MODEL, *(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in chosen), _NAME]

    def join(**flags: Any) -> None:
        add_workers(flags)

    join.__signature__ = inspect.Signature(required)  # type: ignore[attr-defined]
    join.__annotations__ = {each.name: each.annotation for each in required}
    join.__doc__ = HELP
    return join


def _panel(parameter: inspect.Parameter) -> str | None:
    (option,) = parameter.annotation.__metadata__
    panel: str | None = option.rich_help_panel
    return panel


def add_workers(flags: Mapping[str, object]) -> None:
    """Returns when they were stopped and have ended, or the deployment has.

    Raises: ConfigurationError, StartFailed.
    """
    from rich.console import Console
    from rich.text import Text

    from polyphase.cli.serve import run_in_foreground
    from polyphase.config import load_serve_settings
    from polyphase.launch import JoinedWorkers, find_deployment, plan_joining

    name = flags["name"]
    assert name is None or isinstance(name, str)
    record = find_deployment(name, os.environ)
    settings = load_serve_settings({**flags, "name": record.name}, os.environ)
    plan = plan_joining(settings, record)
    console = Console(highlight=False)

    async def say_where(workers: JoinedWorkers) -> None:
        served = ", ".join(plan.model_names)
        console.print(Text(f"  {record.url}/v1 serves {served}; Ctrl-C lets these workers leave", "dim"), soft_wrap=True)

    joined = run_in_foreground(plan, lambda hear: JoinedWorkers(plan, record, hear), console, say_where)
    if joined.has_deployment_ended:
        console.print(Text(f"the deployment {record.name!r} has ended, and its workers here with it", "yellow"))
