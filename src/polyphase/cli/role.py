"""`polyphase role`: give a running worker another role, and show what becomes of the requests that it is no longer for."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from rich.console import Console

from polyphase.launch import find_deployment
from polyphase.router import shortcomings
from polyphase.runtime import Moving, Registry, Settled, Switched, switch_role
from polyphase.wire.cards import Role


def change_role(worker_id: str, role: Role, name: str | None, *, is_forced: bool) -> None:
    """Raises: ConfigurationError if nothing runs, or the worker cannot or should not take the role; WorkerLost."""
    record = find_deployment(name, os.environ)
    asyncio.run(_change(Path(record.run_folder), worker_id, role, Console(highlight=False), is_forced=is_forced))


async def _change(run_folder: Path, worker_id: str, role: Role, console: Console, *, is_forced: bool) -> None:
    misplaced_count = 0
    with console.status(f"{worker_id} becomes a {role} worker …") as progress:
        async for news in switch_role(run_folder, worker_id, role, is_forced=is_forced):
            match news:
                case Switched(before, _, misplaced_count, after_s):
                    if before is role:
                        console.print(f"{worker_id} is a {role} worker already")
                    else:
                        console.print(f"{worker_id}: {before} → {role} [dim]after {after_s * 1e3:.0f} ms[/]")
                    progress.update(_left(misplaced_count))
                case Moving(left_count, _):
                    progress.update(_left(left_count))
                case Settled(left_count, after_s):
                    _tell_end(console, misplaced_count, left_count, after_s)
    entries = Registry(run_folder).entries()
    model = next((entry.model for entry in entries if entry.worker_id == worker_id), None)
    for line in shortcomings(entry.role for entry in entries if entry.model == model and not entry.is_draining):
        console.print(line, style="yellow")


def _tell_end(console: Console, misplaced_count: int, left_count: int, after_s: float) -> None:
    if misplaced_count:
        console.print(f"{_requests(misplaced_count - left_count)} went on elsewhere or ended [dim]after {after_s * 1e3:.0f} ms[/]")
    if left_count:
        console.print(f"{_requests(left_count)} stay until they end: no other worker took them", style="yellow")


def _left(count: int) -> str:
    return f"{_requests(count)} move to other workers …" if count else "done"


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"
