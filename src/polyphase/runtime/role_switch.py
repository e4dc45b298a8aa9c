"""Gives a running worker another role, for whoever decides so: a person at the command line, or a planner.

check ─► SwitchRole ─► the worker has the role, the registry shows it ─► frontends move what it is not for ─► nothing misplaced is left
                      └──────────── `Switched` ────────────┘             └─────────── progress, then `Settled` ───────────┘
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path

from polyphase.core.errors import ConfigurationError, WorkerLost
from polyphase.runtime.channel import WorkerClient
from polyphase.runtime.registry import Registry
from polyphase.wire.cards import Role, WorkerEntry, WorkerStatus
from polyphase.wire.requests import Question

ANSWER_TIMEOUT_S = 5.0
POLL_INTERVAL_S = 0.01


@dataclass(frozen=True, slots=True)
class Switched:
    """The worker has its new role. `misplaced_count` requests that it is not for run there still."""

    before: Role
    after: Role
    misplaced_count: int
    after_s: float


@dataclass(frozen=True, slots=True)
class Moving:
    misplaced_count: int
    after_s: float


@dataclass(frozen=True, slots=True)
class Settled:
    """All that will happen soon has happened: `misplaced_count` requests stay until they end, because nobody else took them."""

    misplaced_count: int
    after_s: float


def find_worker(worker_id: str, entries: Collection[WorkerEntry]) -> WorkerEntry:
    """Raises: ConfigurationError naming the workers that there are."""
    for entry in entries:
        if entry.worker_id == worker_id:
            return entry
    names = ", ".join(sorted(entry.worker_id for entry in entries)) or "none at the moment"
    raise ConfigurationError(f"there is no worker {worker_id!r}; living workers: {names}")


def why_not_without_force(entry: WorkerEntry, role: Role, entries: Collection[WorkerEntry]) -> str | None:
    """A sentence if the fleet would be worse off than anybody is likely to want."""
    if role is not Role.PREFILL:
        return None
    others = [other for other in entries if other.worker_id != entry.worker_id and other.model == entry.model and not other.is_draining]
    if any(other.role is not Role.PREFILL for other in others):
        return None
    what = "prefill workers would have to serve requests whole" if others else "it would have to serve requests whole all the same"
    return f"worker {entry.worker_id} is the last one of model {entry.model!r} that decodes; without it, {what}"


async def switch_role(
    run_folder: Path, worker_id: str, role: Role, *, is_forced: bool = False, patience_s: float = 10.0
) -> AsyncGenerator[Switched | Moving | Settled, None]:
    """Do it, and tell how it goes. For a worker that has the role already, this only tells.

    Args:
        patience_s: how long to watch requests leave; they leave without being watched, too.

    Raises: ConfigurationError if there is no such worker, it will not, or only by force; WorkerLost if it does not answer.
    Cancel: once `Switched` was told, the switch stands.
    """
    entries = Registry(run_folder).entries()
    entry = find_worker(worker_id, entries)
    if not is_forced and entry.role is not role and (reason := why_not_without_force(entry, role, entries)) is not None:
        raise ConfigurationError(f"{reason}; to do it nevertheless, add --force")
    began_s = time.monotonic()
    client = WorkerClient(lambda _: None, name="role")
    receiving = asyncio.create_task(client.run())
    try:
        client.connect(worker_id, entry.request_endpoint)
        status = await client.switch_role(worker_id, role, ANSWER_TIMEOUT_S)
        yield Switched(entry.role, role, status.misplaced_count, time.monotonic() - began_s)
        async with aclosing(_watch(client, worker_id, status, began_s, patience_s)) as progress:
            async for news in progress:
                yield news
    finally:
        receiving.cancel()
        client.close()
        with suppress(asyncio.CancelledError):
            await receiving


async def _watch(
    client: WorkerClient, worker_id: str, status: WorkerStatus, began_s: float, patience_s: float
) -> AsyncGenerator[Moving | Settled, None]:
    count = status.misplaced_count
    while count and time.monotonic() - began_s < patience_s:
        await asyncio.sleep(POLL_INTERVAL_S)
        answer = await client.ask(worker_id, Question.STATUS, ANSWER_TIMEOUT_S)
        if not isinstance(answer, WorkerStatus):
            raise WorkerLost(f"worker {worker_id} answered the question for its status with {type(answer).__name__}")
        if answer.misplaced_count != count:
            count = answer.misplaced_count
            yield Moving(count, time.monotonic() - began_s)
    yield Settled(count, time.monotonic() - began_s)
