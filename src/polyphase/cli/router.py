"""`polyphase router`: what a routing policy can be put together from, and which settings suit a load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

router_commands = typer.Typer(help="What the router weighs, and which settings suit a load.", no_args_is_help=True)


@router_commands.command()
def tune(
    trace: Annotated[
        Path | None, typer.Argument(metavar="TRACE", help="File in Mooncake's form. [default: made-up chats under one system prompt]")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="How many are played, the first ones of a trace.")] = 1000,
    speedup: Annotated[float, typer.Option(min=0.001, help="By which arrivals are hastened.")] = 1.0,
    workers: Annotated[int, typer.Option(min=1, max=4096, help="Simulated workers.")] = 8,
    frontends: Annotated[int, typer.Option(min=1, max=64, help="Frontends, each with a router of its own.")] = 1,
    model: Annotated[str, typer.Option(help="What the workers imagine to serve, as --mock-model.")] = "llama-3.1-8b",
    accelerator: Annotated[str, typer.Option(help="And on what, as --mock-accelerator.")] = "h100",
    tries: Annotated[
        list[str] | None,
        typer.Option("--try", metavar="SETTINGS", help="Such as uncached=2,decode=0.1 or policy=least-loaded; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the made-up chats.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="All figures.")] = False,
) -> None:
    """Play a load to a simulated fleet under several settings, and show which serves it best.

    Example: polyphase router tune trace.jsonl --speedup 5 --workers 16
    """
    from polyphase.cli.tuning import TuneOptions
    from polyphase.cli.tuning import tune as tune_router

    options = TuneOptions(trace, requests, speedup, workers, frontends, model, accelerator, tuple(tries or ()), seed)
    tune_router(options, is_json=as_json)


@router_commands.command()
def parts() -> None:
    """List what a policy can be put together from, with units and default weights; parts of installed packages too."""
    from polyphase.cli.part_list import show_parts

    show_parts()
