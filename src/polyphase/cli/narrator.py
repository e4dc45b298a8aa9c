"""What a person sees of a deployment: its start as it happens, and later whatever goes otherwise than it should."""

from __future__ import annotations

import asyncio
import json
import shlex
import time

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from polyphase.launch import DeploymentPlan, Exited, JoinedWorkers, LocalDeployment, News, Ready, Started, Stopping
from polyphase.launch.process import ProcessKind, exit_phrase

REFRESH_S = 0.15
QUESTION = "What does os.path.join do?"


class Narrator:
    """Prints news of the supervisor. Silent about what goes well, but for readiness."""

    def __init__(self, console: Console, drain_timeout_s: float) -> None:
        self._console = console
        self._drain_timeout_s = drain_timeout_s
        self._restarting: set[str] = set()

    def tell(self, news: News) -> None:
        match news:
            case Exited(name=name, exit_code=exit_code, last_words=last_words, restart_after_s=delay_s):
                self._restarting.add(name)
                why = f" (last logged error: {last_words})" if last_words and exit_code >= 0 else ""
                self._say(f"{name} ended, {exit_phrase(exit_code)}; starting it again in {delay_s:.0f} s{why}", "yellow")
            case Started(name=name, pid=pid) if name in self._restarting:
                self._restarting.discard(name)
                self._say(f"{name} was started again, pid {pid}", "yellow")
            case Stopping(names=names):
                patience = f"running requests have {self._drain_timeout_s:.0f} s to finish; Ctrl-C again ends them"
                self._say(f"Stopping {', '.join(names)}" + (f" ({patience})" if "frontend" in names else ""), "dim")
            case Ready(after_s=after_s):
                self._say(f"Ready in {after_s:.1f} s", "bold green")
            case _:
                pass

    def _say(self, text: str, style: str) -> None:
        self._console.print(Text(text, style), soft_wrap=True)


async def show_start(console: Console, deployment: LocalDeployment | JoinedWorkers) -> None:
    """Until the deployment is ready. On a terminal, a live table of what each process is doing; elsewhere one line."""
    plan = deployment.plan
    frontends = f"{plan.describe_frontends()}, " if isinstance(deployment, LocalDeployment) else ""
    console.print(
        f"[bold]Polyphase[/] serves [bold]{escape(', '.join(plan.model_names))}[/]: {frontends}{plan.describe_workers()}, "
        f"{plan.threads_per_worker} thread{'s' if plan.threads_per_worker > 1 else ''} each; logs in {escape(str(deployment.logs_folder))}",
        soft_wrap=True,
    )
    if not console.is_terminal:
        await deployment.ready.wait()
        return
    began_s = time.monotonic()
    with Live(console=console, transient=True, auto_refresh=False) as live:
        while not deployment.ready.is_set():
            live.update(_start_table(deployment, time.monotonic() - began_s), refresh=True)
            await asyncio.sleep(REFRESH_S)


def _start_table(deployment: LocalDeployment | JoinedWorkers, elapsed_s: float) -> Table:
    joined = deployment.joined_worker_ids()
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    spinner = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"[int(elapsed_s * 8) % 10]
    for child in deployment.processes:
        said = child.log.last_message() or "starting"
        is_there = child.spec.name in joined or (child.spec.kind is ProcessKind.FRONTEND and said != "starting")
        table.add_row(
            Text("✓", "green") if is_there else Text(spinner, "cyan"),
            child.spec.name,
            Text(said if len(said) <= 100 else said[:99] + "…", "dim", no_wrap=True, overflow="ellipsis"),
        )
    table.add_row("", "", Text(f"{elapsed_s:.0f} s", "dim"))
    return table


def curl_example(plan: DeploymentPlan, question: str = QUESTION) -> str:
    """A command line for a shell, on one line."""
    body = json.dumps({"model": plan.model.served_name, "messages": [{"role": "user", "content": question}]})
    return f"curl {plan.url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def print_try_next(console: Console, plan: DeploymentPlan) -> None:
    """Lines that may be copied: nothing here is broken by us, only by the terminal."""
    name = f" --name {plan.settings.name}" if plan.settings.name != "default" else ""
    facts = [
        ("URL", f"{plan.url}/v1"),
        ("model" if len(plan.model_names) == 1 else "models", ", ".join(plan.model_names)),
        ("try", curl_example(plan)),
        ("", f"polyphase chat{name}"),
        ("", f"polyphase status --watch{name}"),
        ("stop", "Ctrl-C"),
    ]
    for label, value in facts:
        console.print(Text.assemble((f"  {label:<6} ", "dim"), value), soft_wrap=True)
