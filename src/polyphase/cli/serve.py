"""`polyphase serve`: run a deployment in the foreground, and tell what it does."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from polyphase.cli.narrator import Narrator, print_try_next, show_start
from polyphase.config import load_serve_settings
from polyphase.launch import DeploymentPlan, JoinedWorkers, LocalDeployment, News, Stopping, plan_deployment

Running = TypeVar("Running", LocalDeployment, JoinedWorkers)


def serve_model(flags: Mapping[str, object], config: Path | None) -> None:
    """Returns when the deployment was stopped and has ended.

    Raises: ConfigurationError, StartFailed.
    """
    plan = plan_deployment(load_serve_settings(flags, os.environ, config))
    console = Console(highlight=False)

    async def say_what_next(deployment: LocalDeployment) -> None:
        print_try_next(console, plan)

    run_in_foreground(plan, lambda hear: LocalDeployment(plan, hear), console, say_what_next)


def run_in_foreground(
    plan: DeploymentPlan,
    make: Callable[[Callable[[News], None]], Running],
    console: Console,
    when_ready: Callable[[Running], Awaitable[None]],
) -> Running:
    """Run until stopped by a signal, or by `when_ready`, which runs once beside the deployment and is cancelled when that stops.

    Returns: what has run. Raises: ConfigurationError, StartFailed, and whatever `when_ready` raises; the deployment has ended then.
    """
    return asyncio.run(_run(plan, make, console, when_ready))


async def _run(
    plan: DeploymentPlan,
    make: Callable[[Callable[[News], None]], Running],
    console: Console,
    when_ready: Callable[[Running], Awaitable[None]],
) -> Running:
    narrator = Narrator(console, plan.settings.drain_timeout)
    beside: asyncio.Task[None] | None = None

    def hear(news: News) -> None:
        narrator.tell(news)
        if isinstance(news, Stopping) and beside is not None:
            beside.cancel()

    async def show_and_use(deployment: Running) -> None:
        await show_start(console, deployment)
        await when_ready(deployment)

    with make(hear) as deployment:
        running = asyncio.create_task(deployment.run())
        beside = asyncio.create_task(show_and_use(deployment))
        try:
            await asyncio.wait({running, beside}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done() and not beside.cancelled() and beside.exception() is not None:
                deployment.stop()
            await asyncio.wait({running})
        finally:
            for task in (running, beside):
                task.cancel()  # does nothing to one that has ended
            await asyncio.wait({running, beside})
        for task in (running, beside):
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
        return deployment
