"""A whole deployment in one event loop, without a process of its own: frontend, workers before OpenAI-compatible servers, real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from polyphase.engines.openai.assembly import load_openai_engine
from polyphase.engines.openai.settings import OpenAISettings
from polyphase.engines.served.engine import ServedEngine
from polyphase.frontend.settings import FrontendSettings
from polyphase.runtime import Registry, WorkerPaths
from polyphase.runtime.paths import ensure_private_folder
from polyphase.wire.cards import Role, WorkerEntry
from polyphase.worker.host import HostSettings, WorkerHost
from polyphase.worker.options import TransferOptions
from polyphase.worker.transfer import join_transfer
from tests.unit.frontend.stack import Stack, wait_for
from tests.unit.frontend.stack import serving as serving_frontend
from tests.unit.openai.server import MODEL, OpenAIServer


@dataclass
class Hosted:
    engine: ServedEngine
    host: WorkerHost
    task: asyncio.Task[None]


@dataclass
class Served:
    """The model is served as `large`, and `big` stands for that."""

    frontend: Stack
    workers: dict[str, Hosted] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.frontend.url

    def client(self) -> openai.AsyncOpenAI:
        return self.frontend.client()

    async def post(self, path: str, body: Any) -> httpx.Response:
        return await self.frontend.post(path, body)

    async def latest_record(self) -> dict[str, Any]:
        page = (await self.frontend.get("/debug/requests?limit=1")).json()
        return await self.frontend.record(page["data"][0]["answer_id"])

    def chosen(self, record: dict[str, Any]) -> str:
        return str(record["decode_worker"])


async def load(server: OpenAIServer, **settings: Any) -> ServedEngine:
    """In a thread, as probing blocks and the server is served by this loop."""
    given = {"model": MODEL, "name": "large", "url": server.url, **settings}
    return await asyncio.to_thread(load_openai_engine, OpenAISettings(**given))


@asynccontextmanager
async def hosting(served: Served, worker_id: str, engine: ServedEngine) -> AsyncIterator[Hosted]:
    run_folder = served.frontend.run_folder
    paths = WorkerPaths.of(run_folder, worker_id)
    ensure_private_folder(paths.request_socket.parent)
    entry = WorkerEntry(
        worker_id=worker_id,
        epoch=1,
        role=Role.BOTH,
        model=engine.card.name,
        pid=os.getpid(),
        host="here",
        request_endpoint=paths.request_endpoint,
        event_endpoint=paths.event_endpoint,
        aliases=["big"],
    )
    with join_transfer(engine, entry, str(paths.pool_socket), TransferOptions(None, None)) as (agent, region):
        host = WorkerHost(engine, Registry(run_folder).claim(worker_id), HostSettings(entry, paths, 5.0, agent, region))
        task = asyncio.create_task(host.run())
        try:
            await wait_for(lambda: any(view.facts.worker_id == worker_id for view in served.frontend.router.workers()))
            yield Hosted(engine, host, task)
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, BaseExceptionGroup):
                await task
            engine.close()


@asynccontextmanager
async def serving(card: Any, *servers: OpenAIServer, **settings: Any) -> AsyncIterator[Served]:
    """A worker `w0`, `w1`, … for each server."""
    async with AsyncExitStack() as stack:
        frontend = await stack.enter_async_context(
            serving_frontend(card, [], FrontendSettings(migration_patience_s=0.3, request_timeout_s=settings.pop("timeout_s", 30)))
        )
        served = Served(frontend)
        for at, server in enumerate(servers):
            engine = await load(server, **settings)
            served.workers[f"w{at}"] = await stack.enter_async_context(hosting(served, f"w{at}", engine))
            server.seen.clear()
        yield served
