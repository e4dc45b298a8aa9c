"""What must be true when all is over. Each check returns what is wrong, as sentences."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import httpx

from polyphase.cli.status import ask_workers
from polyphase.testing import Deployment

SETTLING_S = 60.0  # leases that nobody will read run out after 30 s
BUGS = re.compile(r"kv_error|KvError|released more often|named although|is not scheduled|an engine step failed|inconsistent|AssertionError")


async def at_rest(served: Deployment, worker_ids: list[str]) -> list[str]:
    """Every worker is back, nothing runs, no block is used, nothing is booked; waited for, but not for ever."""
    deadline_s = time.monotonic() + SETTLING_S
    while found := await _not_at_rest(served, worker_ids):
        if time.monotonic() > deadline_s:
            return found
        await asyncio.sleep(0.25)
    return []


async def _not_at_rest(served: Deployment, worker_ids: list[str]) -> list[str]:
    found = []
    async with httpx.AsyncClient(base_url=served.url, timeout=10) as client:
        health: dict[str, Any] = (await client.get("/health")).json()
    if health["active_requests"]:
        found.append(f"{health['active_requests']} requests are active though no client waits")
    known = {name: worker for model in health["models"].values() for name, worker in model["workers"].items()}
    for worker_id, worker in known.items():
        booked = {key: worker[key] for key in ("booked_requests", "booked_prefill_tokens", "booked_blocks") if worker[key]}
        if booked:
            found.append(f"bookings of {worker_id} did not return to zero: {booked}")
        if worker["is_stalled"]:
            found.append(f"{worker_id} is taken for stalled")
    answers = await ask_workers(served.run_folder)
    for worker_id in worker_ids:
        status = answers.get(worker_id)
        if status is None or worker_id not in known:
            found.append(f"{worker_id} is not back")
            continue
        load = status.load
        held = {
            name: count
            for name in ("used_block_count", "leased_block_count", "running_count", "waiting_count", "waiting_prefill_tokens")
            if (count := getattr(load, name))
        }
        if held:
            found.append(f"{worker_id} still holds {held}")
    return found


EFFECTS = {
    "moved": "leaves worker",
    "migrated": "goes on elsewhere after",
    "refused_for_role": "worker now, no longer",
    "stalls": "stands still and gets no requests",
    "connections_lost": "the connection to worker",
    "offers_not_used": "computed here",
}


def effects(served: Deployment) -> dict[str, int]:
    """What the faults led to, as far as the logs still tell: a chaos that leads to nothing says nothing."""
    logs = served.logs()
    return {name: len(re.findall(pattern, logs)) for name, pattern in EFFECTS.items()}


def log_lines(served: Deployment) -> list[str]:
    """What only a bug writes: blocks freed twice, steps that failed."""
    return [f"log: {line}" for line in served.logs().splitlines() if BUGS.search(line)]


def nothing_left(served: Deployment, exit_code: int, shared_before: set[str]) -> list[str]:
    """After the end of the deployment, before its folder goes."""
    found = []
    if exit_code != 0:
        found.append(f"the deployment ended with exit code {exit_code}:\n{served.output()[-2000:]}")
    if pids := served.pids():
        found.append(f"processes are left: {sorted(pids)}")
    home = str(served.home)
    if sockets := [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if home in line]:
        found.append(f"sockets are left: {sockets}")
    if files := [str(path) for path in served.home.rglob("*") if path.name != "serve.out" and not path.is_dir()]:
        found.append(f"files are left: {files}")
    if shared := shared_memory() - shared_before:
        found.append(f"shared memory is left: {sorted(shared)}")
    return found


def shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir() if "polyphase" in path.name} if folder.is_dir() else set()
