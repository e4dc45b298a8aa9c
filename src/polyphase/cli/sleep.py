"""`polyphase sleep` and `polyphase wake`: a worker gives its accelerator's memory free for a while, and takes it back."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from polyphase.launch import find_deployment
from polyphase.runtime import Registry, WorkerClient
from polyphase.runtime.role_switch import find_worker

PATIENCE_S = 600.0  # requests that nobody else takes end first


def change_sleep(worker_id: str, name: str | None, *, is_asleep: bool) -> None:
    """Raises: ConfigurationError if nothing runs, or the worker will not; WorkerLost."""
    record = find_deployment(name, os.environ)
    asyncio.run(_change(Path(record.run_folder), worker_id, Console(highlight=False), is_asleep=is_asleep))


async def _change(run_folder: Path, worker_id: str, console: Console, *, is_asleep: bool) -> None:
    entry = find_worker(worker_id, Registry(run_folder).entries())
    began_s = time.monotonic()
    client = WorkerClient(lambda _: None, name="sleep")
    receiving = asyncio.create_task(client.run())
    try:
        client.connect(worker_id, entry.request_endpoint)
        doing = "falls asleep once its requests have gone elsewhere or ended" if is_asleep else "wakes"
        with console.status(f"{worker_id} {doing} …"):
            await client.switch_sleep(worker_id, PATIENCE_S, is_asleep=is_asleep)
    finally:
        receiving.cancel()
        client.close()
        with suppress(asyncio.CancelledError):
            await receiving
    console.print(f"{worker_id} is {'asleep' if is_asleep else 'awake'} [dim]after {time.monotonic() - began_s:.1f} s[/]")
