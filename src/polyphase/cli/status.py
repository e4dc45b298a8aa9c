"""`polyphase status`: asks each worker of a deployment for its state, over the run folder, so that it works without a frontend.

A frontend that is there adds what its router complains of.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from polyphase.config import format_bytes
from polyphase.core.errors import ConfigurationError, WorkerLost
from polyphase.launch import DeploymentRecord, find_deployment
from polyphase.router import shortcomings
from polyphase.runtime import Registry, WorkerClient
from polyphase.wire.cards import Role, WorkerEntry, WorkerStatus
from polyphase.wire.requests import Question

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 2.0
WATCH_INTERVAL_S = 1.0
WIDE_COLUMNS = 100
LEGEND = "KV blocks: used / all; hits: prompt tokens found cached; in, out: tokens"
Answers = Mapping[str, WorkerStatus | None]  # by worker id; None: it is there and does not answer


def show_status(name: str | None, *, is_watching: bool) -> None:
    """Raises: ConfigurationError if nothing runs."""
    record = find_deployment(name, os.environ)
    console = Console(highlight=False)
    if not is_watching:
        console.print(asyncio.run(_look(record, console.width)))
        return
    with suppress(KeyboardInterrupt):
        asyncio.run(_watch(record, console))


async def _watch(record: DeploymentRecord, console: Console) -> None:
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(await _look(record, console.width), refresh=True)
            await asyncio.sleep(WATCH_INTERVAL_S)
            try:
                find_deployment(record.name, os.environ)
            except ConfigurationError:
                raise ConfigurationError(f"the deployment {record.name!r} has ended") from None


async def _look(record: DeploymentRecord, width: int) -> Group:
    asked = asyncio.gather(*(ask_frontend(url) for url in record.urls))
    answers, told = await asyncio.gather(ask_workers(Path(record.run_folder)), asked)
    several = len(told) > 1
    remarks = [f"{url}: {line}" if several else line for url, lines in zip(record.urls, told, strict=True) for line in lines]
    return _view(record, answers, remarks, width)


async def ask_frontend(url: str) -> list[str]:
    """What waits there, and what the router has to complain of; nothing if there is no frontend: workers can be seen without one."""
    try:
        async with httpx.AsyncClient(timeout=ANSWER_TIMEOUT_S, trust_env=False) as client:
            page = (await client.get(f"{url}/health")).json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        log.debug("the frontend at %s tells nothing: %s", url, error)
        return []
    return [*_index(page), *_names(page), *_shares(page), *_queues(page), *_warnings(page), *_streams(page)]


def _index(page: Any) -> list[str]:
    index = page.get("index") if isinstance(page, dict) else None
    if not index:
        return []
    count, capacity, forgotten = index["block_count"], index["capacity"], index["forgotten_block_count"]
    loss = f"; {format_count(forgotten)} were forgotten for want of room" if forgotten else ""
    size = format_bytes(index["heap_bytes"])
    return [f"prefix index ({index['kind']}): {format_count(count)} blocks of {format_count(capacity)} at most, {size}{loss}"]


def _streams(page: Any) -> list[str]:
    """One line for each worker whose event stream has been broken, or is."""
    lines = []
    for worker_id, worker in _workers(page):
        stream = worker.get("stream")
        if not stream or (stream["is_synced"] and not stream["gaps"] and not stream["drifts"]):
            continue
        state = "" if stream["is_synced"] else "not up to date; "
        lines.append(
            f"{worker_id}: event stream: {state}{stream['gaps']} gaps ({stream['repairs']} closed), "
            f"{stream['drifts']} times drifted, {stream['snapshots']} snapshots"
        )
    return lines


def _names(page: Any) -> list[str]:
    """One line for each model that clients may call by other names: aliases, and its adapters."""
    models = page.get("models") if isinstance(page, dict) else None
    others = {name: [other for other in model.get("names", []) if other != name] for name, model in sorted((models or {}).items())}
    return [f"{name} is also served as {', '.join(names)}" for name, names in others.items() if names]


def _shares(page: Any) -> list[str]:
    """One line for each model whose groups of workers have weights."""
    models = page.get("models") if isinstance(page, dict) else None
    lines = []
    for name, model in sorted((models or {}).items()):
        weights = model.get("weights", {})
        total = sum(weights.values())
        if total and len(weights) > 1:
            shares = [f"{group} {100 * weight / total:.3g}%" if weight else f"{group} in reserve" for group, weight in weights.items()]
            lines.append(f"shares of {name}: {', '.join(shares)}")
    return lines


def _queues(page: Any) -> list[str]:
    """One line for each queue in which something waits."""
    models = page.get("models") if isinstance(page, dict) else None
    return [_queue_line(name, queue) for name, model in sorted((models or {}).items()) for queue in model.get("queues", [])]


def _queue_line(model: str, queue: dict[str, Any]) -> str:
    count = queue["requests"]
    waiting = f"{count} request{'s wait' if count > 1 else ' waits'}"
    whom = "prefill worker" if queue["waits_for_prefill_worker"] else "worker"
    left = queue["drain_time_s"]
    pace = "" if left is None else f"; sent on within {format_age(left)}"
    oldest = format_age(queue["oldest_wait_s"])
    tokens = format_count(queue["prompt_tokens"])
    return f"queue of {model}: {waiting} for a {whom} with room ({tokens} tokens), the longest for {oldest}{pace}"


def _warnings(page: Any) -> list[str]:
    workers = _workers(page)
    stalls = [f"{worker_id}: stands still; its requests go to others" for worker_id, worker in workers if worker.get("is_stalled")]
    drifts = [
        f"{worker_id}: cache predictions drift ({worker['drift']['reason']}): {worker['drift']['message']}"
        for worker_id, worker in workers
        if worker.get("drift")
    ]
    turned_away = page.get("turned_away", {}) if isinstance(page, dict) else {}
    strangers = [f"{worker_id}: gets no requests: {reason}" for worker_id, reason in sorted(turned_away.items())]
    models = page.get("models") if isinstance(page, dict) else None
    misfits = [line for model in (models or {}).values() for line in model.get("misfits", [])]
    return strangers + stalls + drifts + misfits


def _workers(page: Any) -> list[tuple[str, dict[str, Any]]]:
    """Of all models, in the order of their names."""
    models = page.get("models") if isinstance(page, dict) else None
    workers = {
        worker_id: worker
        for model in (models.values() if isinstance(models, dict) else ())
        for worker_id, worker in model.get("workers", {}).items()
    }
    return sorted(workers.items())


async def ask_workers(run_folder: Path) -> Answers:
    """Every living worker's answer, all asked at once."""
    entries = Registry(run_folder).entries()
    client = WorkerClient(lambda outputs: None, name="status")
    receiving = asyncio.create_task(client.run())
    try:
        for entry in entries:
            client.connect(entry.worker_id, entry.request_endpoint)
        answers = await asyncio.gather(*(_ask(client, entry.worker_id) for entry in entries))
        return {entry.worker_id: answer for entry, answer in zip(entries, answers, strict=True)}
    finally:
        receiving.cancel()
        client.close()


async def _ask(client: WorkerClient, worker_id: str) -> WorkerStatus | None:
    try:
        answer = await client.ask(worker_id, Question.STATUS, ANSWER_TIMEOUT_S)
    except WorkerLost:
        return None
    return answer if isinstance(answer, WorkerStatus) else None


def _view(record: DeploymentRecord, answers: Answers, remarks: list[str], width: int) -> Group:
    up_s = time.time() - record.started_unix_s
    head = f"{record.name}: {record.model} at {', '.join(record.urls)}, up {format_age(up_s)}, pid {record.pid}"
    table = status_table(record.worker_ids, answers, is_wide=width >= WIDE_COLUMNS)
    there = [answer.entry for answer in answers.values() if answer is not None]
    notes = _shortcomings(entry for entry in there if not (entry.is_draining or entry.is_asleep))
    engines = [Text(line, "dim") for line in engine_lines(answers)]
    return Group(Text(head, "bold"), table, Text(LEGEND, "dim"), *engines, *(Text(line, "yellow") for line in notes + remarks))


def _shortcomings(entries: Iterable[WorkerEntry]) -> list[str]:
    """Of each model, by name where there are several."""
    roles: dict[str, list[Role]] = {}
    for entry in entries:
        roles.setdefault(entry.model, []).append(entry.role)
    return [f"{model}: {line}" if len(roles) > 1 else line for model in sorted(roles) for line in shortcomings(roles[model])]


def engine_lines(answers: Answers) -> list[str]:
    """One line for each kind of engine, with what it can; where several differ, with its workers."""
    kinds: dict[str, list[str]] = {}
    for worker_id, status in sorted(answers.items()):
        if status is not None and status.engine:
            kinds.setdefault(f"engine {status.engine}: {', '.join(status.abilities) or 'no further abilities'}", []).append(worker_id)
    return [f"{kind} ({', '.join(worker_ids)})" if len(kinds) > 1 else kind for kind, worker_ids in kinds.items()]


def status_table(expected_worker_ids: list[str], answers: Answers, *, is_wide: bool) -> Table:
    """One row per worker, also for those that should be there and are not; several models each have a heading.

    Not wide: the less telling columns are left out.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for title in ("worker", "role", "state"):
        table.add_column(title, no_wrap=True)
    for title in ("running", "waiting", "KV blocks", "hits", "in", "out", *(("cached", "memory", "up") if is_wide else ())):
        table.add_column(title, justify="right", no_wrap=True)
    model_of = {worker_id: status.entry.model for worker_id, status in answers.items() if status is not None}
    worker_ids = [*expected_worker_ids, *sorted(answers.keys() - set(expected_worker_ids))]
    has_headings = len(set(model_of.values())) > 1
    if has_headings:
        worker_ids.sort(key=lambda worker_id: (worker_id not in model_of, model_of.get(worker_id, "")))
    heading_before: str | None = None
    for worker_id in worker_ids:
        status = answers.get(worker_id)
        heading = model_of.get(worker_id, "") if has_headings else None
        if heading != heading_before:
            table.add_row(Text(heading or "of no known model", "bold"))
            heading_before = heading
        if status is None:
            state = Text("does not answer", "red") if worker_id in answers else Text("not there", "yellow")
            table.add_row(worker_id, "", state)
        else:
            table.add_row(worker_id, *_cells(status), *(_wide_cells(status) if is_wide else ()))
    return table


def _cells(status: WorkerStatus) -> list[str | Text]:
    load = status.load
    return [
        status.entry.role.value,
        _state(status),
        str(load.running_count),
        str(load.waiting_count),
        f"{load.used_block_count}/{load.block_count}",
        _percent(load.cached_prompt_tokens_total, load.prompt_tokens_total),
        format_count(load.prompt_tokens_total),
        format_count(load.generated_tokens_total),
    ]


def _state(status: WorkerStatus) -> Text:
    if status.entry.is_draining:
        return Text("draining", "yellow")
    return Text("asleep", "yellow") if status.entry.is_asleep else Text("ready", "green")


def _wide_cells(status: WorkerStatus) -> list[str]:
    load = status.load
    return [_percent(load.cached_block_count, load.block_count), format_bytes(status.rss_bytes), format_age(status.uptime_s)]


def format_count(count: int) -> str:
    """`999`, `12.3k`, `4.5M`."""
    if count < 10_000:
        return str(count)
    return f"{count / 1e3:.1f}k" if count < 1_000_000 else f"{count / 1e6:.1f}M"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "-"


def format_age(seconds: float) -> str:
    """`42s`, `3m10s`, `2h05m`, `4d03h`."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
