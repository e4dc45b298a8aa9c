"""What must be true when all is over. Each check returns what is wrong, as sentences."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import httpx

from polyphase.cli.status import ask_workers
from polyphase.core.errors import ConfigurationError, WorkerLost
from polyphase.runtime import switch_role
from polyphase.testing import Deployment
from polyphase.wire.cards import Role

SETTLING_S = 60.0  # leases that nobody will read run out after 30 s
SETTLING_WITHOUT_FAULTS_S = 10.0  # then all leases were given back by their readers
BUGS = re.compile(r"kv_error|KvError|released more often|named although|is not scheduled|an engine step failed|inconsistent|AssertionError")


async def at_rest(served: Deployment, worker_ids: list[str], settling_s: float = SETTLING_S) -> list[str]:
    """Every worker is back, nothing runs, no block is used, nothing is booked; waited for, but not for ever."""
    deadline_s = time.monotonic() + settling_s
    while found := await _not_at_rest(served, worker_ids):
        if time.monotonic() > deadline_s:
            return found
        await asyncio.sleep(0.25)
    return []


async def _not_at_rest(served: Deployment, worker_ids: list[str]) -> list[str]:
    found = []
    known: set[str] = set(worker_ids)
    for url in served.urls:
        at_frontend, its_workers = await _not_at_rest_at(url)
        found += at_frontend
        known &= its_workers
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


async def _not_at_rest_at(url: str) -> tuple[list[str], set[str]]:
    """What is wrong with the books of one frontend, and the workers that it knows."""
    try:
        async with httpx.AsyncClient(base_url=url, timeout=10) as client:
            health: dict[str, Any] = (await client.get("/health")).json()
    except httpx.HTTPError as error:
        return [f"the frontend at {url} is not back: {error!r}"], set()
    found = []
    if health["active_requests"]:
        found.append(f"{health['active_requests']} requests are active at {url} though no client waits")
    known = {name: worker for model in health["models"].values() for name, worker in model["workers"].items()}
    for worker_id, worker in known.items():
        booked = {key: worker[key] for key in ("booked_requests", "booked_prefill_tokens", "booked_blocks") if worker[key]}
        if booked:
            found.append(f"bookings of {worker_id} at {url} did not return to zero: {booked}")
        if worker["is_stalled"]:
            found.append(f"{worker_id} is taken for stalled at {url}")
    return found, set(known)


async def restore_roles(served: Deployment, worker_ids: list[str]) -> list[str]:
    """Each worker gets the role of its name back."""
    found = []
    for worker_id in sorted(worker_ids):  # decode before prefill, so that somebody always decodes
        try:
            async for _ in switch_role(served.run_folder, worker_id, Role(worker_id.split("-")[0])):
                pass
        except (ConfigurationError, WorkerLost) as error:
            found.append(f"{worker_id} does not take its role back: {error.message}")
    return found


async def hands_over(served: Deployment, rng: random.Random, token_count: int = 400) -> list[str]:
    """A prompt that nobody has seen is split, and its blocks arrive: no pool, session or import was lost on the way."""
    found = []
    for url in served.urls:
        body = {"model": "demo", "prompt": [rng.randrange(300, 1300) for _ in range(token_count)], "max_tokens": 4}
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            answer = await client.post("/v1/completions", json=body)
            if answer.status_code != 200:
                found.append(f"at {url}, after all faults: status {answer.status_code}: {answer.text}")
                continue
            record = (await client.get(f"/debug/requests/{answer.headers['x-request-id']}")).json()
        moved = record["transferred_tokens"]
        if not record["split"] or moved < token_count // 2:
            found.append(f"at {url}, after all faults, {moved} of {token_count} tokens of a prompt are handed over; {record['reason']}")
    return found


EFFECTS = {
    "moved": "leaves worker",
    "migrated": "goes on elsewhere after",
    "refused_for_role": "worker now, no longer",
    "stalls": "stands still and gets no requests",
    "connections_lost": "the connection to worker",
    "offers_not_used": "computed here",
    "parts_not_used": "are not pulled ahead",
    "requests_of_dead_frontends": "a peer went away or does not read",
}


def effects(served: Deployment) -> dict[str, int]:
    """What the faults led to, as far as the logs still tell: a chaos that leads to nothing says nothing."""
    logs = served.logs()
    return {name: len(re.findall(pattern, logs)) for name, pattern in EFFECTS.items()}


def log_lines(served: Deployment) -> list[str]:
    """What only a bug writes: blocks freed twice, steps that failed, processes that ended by themselves."""
    logs = served.logs()
    return [f"log: {line}" for line in logs.splitlines() if BUGS.search(line)] + breakdowns(logs)


def breakdowns(logs: str) -> list[str]:
    """Processes that broke down, but for those that could not begin because their disk was full; what a full disk cut off is no proof."""
    found = []
    for told in re.findall(r"^[-\d]+ [\d:.]+ ERROR .* broke down.*\n(?:(?![-\d]+ [\d:.]+ |===).*\n?)*", logs, re.MULTILINE):
        causes = re.findall(r"^[\s|+]*(?:\w+\.)*(\w*(?:Error|Exception|Lost|Failed): .*)$", told, re.MULTILINE)
        if causes and not re.search(r"No space left on device|File too large", told):
            found.append(f"log: {told.splitlines()[0]}: {causes[-1]}")
    return found


async def frees_what_a_dead_frontend_asked_for(served: Deployment, token_count: int = 4000, patience_s: float = 8.0) -> list[str]:
    """A long answer begins, its frontend is killed, and no worker goes on with it. (Only where `token_count` tokens take far longer.)"""
    url = served.urls[-1]
    body = {"model": "demo", "prompt": list(range(300, 316)), "max_tokens": token_count, "ignore_eos": True, "stream": True}
    with contextlib.suppress(httpx.HTTPError):
        async with httpx.AsyncClient(base_url=url, timeout=60) as client, client.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data:"):
                    os.kill(served.frontend_pids()[url], signal.SIGKILL)
                    break
    until_s = time.monotonic() + patience_s
    while True:
        answers = await ask_workers(served.run_folder)
        busy = [name for name, status in answers.items() if status is not None and status.load.running_count]
        if not busy:
            return []
        if time.monotonic() > until_s:
            return [f"{patience_s:.0f} s after their frontend was killed, {', '.join(busy)} still compute for it"]
        await asyncio.sleep(0.1)


def nothing_left(served: Deployment, exit_code: int, mapped: set[str]) -> list[str]:
    """After the end of the deployment, before its folder goes, where its temporary files are too. `mapped`: shared memory that it had."""
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
    if shared := {path for path in mapped if Path(path).exists()}:
        found.append(f"shared memory is left: {sorted(shared)}")
    return found


def mapped_shared_memory(served: Deployment) -> set[str]:
    """Named shared memory of living processes of the deployment. (The pools have no name, and are gone with their last process.)"""
    found = set()
    for pid in served.pids():
        try:
            found |= set(re.findall(r"(/dev/shm/\S+)", Path(f"/proc/{pid}/maps").read_text()))
        except OSError:
            continue
    return found
