"""A whole frontend on a loopback port, with fake workers behind it, in the test's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai

from polyphase.frontend.app import build_app
from polyphase.frontend.dispatch import Dispatcher
from polyphase.frontend.endpoints import Services
from polyphase.frontend.fleet import Fleet
from polyphase.frontend.grammar_checks import GrammarChecks
from polyphase.frontend.metrics import Metrics
from polyphase.frontend.models import Models
from polyphase.frontend.records import Records
from polyphase.frontend.server import HttpServer, open_socket
from polyphase.frontend.settings import FrontendSettings
from polyphase.router import PullRule, Router, RouterSettings, SplitRule
from polyphase.runtime import Registry
from polyphase.wire.cards import ModelCard, Role

from .fake_worker import FakeWorker

SPLIT_FROM = 32  # prompt tokens


@dataclass
class Stack:
    run_folder: Path
    card: ModelCard
    story: list[int]
    router: Router
    services: Services
    server: HttpServer
    url: str
    workers: dict[str, FakeWorker] = field(default_factory=dict)
    _peers: dict[str, FakeWorker] = field(default_factory=dict)

    async def add(
        self, worker_id: str, role: Role = Role.BOTH, card: ModelCard | None = None, labels: dict[str, str] | None = None, **entry: Any
    ) -> FakeWorker:
        """A worker that the router knows by the time this returns."""
        worker = await self.add_unready(worker_id, role, card, labels, **entry)
        await wait_for(lambda: any(v.facts.worker_id == worker_id and v.facts.epoch == worker.epoch for v in self.router.workers()))
        return worker

    async def add_unready(
        self, worker_id: str, role: Role = Role.BOTH, card: ModelCard | None = None, labels: dict[str, str] | None = None, **entry: Any
    ) -> FakeWorker:
        worker = FakeWorker(self.run_folder, worker_id, card or self.card, self.story, role, self._peers, labels, **entry)
        await worker.start()
        self.workers[worker_id] = worker
        return worker

    async def kill(self, worker_id: str) -> None:
        await self.workers.pop(worker_id).die()

    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    async def get(self, path: str) -> httpx.Response:
        async with _http_client() as client:
            return await client.get(f"{self.url}{path}")

    async def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        async with _http_client() as client:
            if body is not None:
                options["json"] = body
            return await client.post(f"{self.url}{path}", **options)

    async def record(self, name: str) -> dict[str, Any]:
        page: dict[str, Any] = (await self.get(f"/debug/requests/{name}")).json()
        return page

    @property
    def is_at_rest(self) -> bool:
        """Nothing runs, nothing is booked, nothing is leased."""
        return (
            self.services.dispatcher.active_count == 0
            and all(v.booked_request_count == v.booked_block_count == v.booked_prefill_tokens == 0 for v in self.router.workers())
            and all(not worker.running and not worker.leases for worker in self.workers.values())
        )


def _http_client() -> httpx.AsyncClient:
    """For plain HTTP: reading the certificates of the machine takes 30 ms for each client."""
    return httpx.AsyncClient(timeout=30, verify=False, trust_env=False)


async def wait_for(condition: Callable[[], object], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def serving(card: ModelCard, story: list[int], settings: FrontendSettings) -> AsyncIterator[Stack]:
    run_folder = Path(tempfile.mkdtemp(prefix="ppf-", dir="/tmp"))  # short: socket paths end at about 100 bytes
    router = Router(RouterSettings(split=SplitRule(min_uncached_tokens=SPLIT_FROM), pull=PullRule(is_on=True)))
    models, metrics = Models(), Metrics()
    fleet = Fleet(Registry(run_folder), router, models, settings)
    dispatcher = Dispatcher(router, fleet.send, metrics, settings)
    grammars = GrammarChecks(settings.grammar_cpu_s)
    services = Services(
        models,
        dispatcher,
        Records(settings.record_count),
        metrics,
        settings,
        grammars,
        streams=fleet.streams,
        turned_away=fleet.turned_away,
    )
    listener = open_socket("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = HttpServer(build_app(services, router), services, listener)
    stack = Stack(run_folder, card, story, router, services, server, f"http://127.0.0.1:{port}")
    tasks = [asyncio.create_task(fleet.run(dispatcher)), asyncio.create_task(server.run())]
    try:
        yield stack
    finally:
        server.stop_now()
        await asyncio.wait_for(tasks[1], 30)
        for worker_id in list(stack.workers):
            await stack.kill(worker_id)
        grammars.close()
        tasks[0].cancel()
        await asyncio.gather(tasks[0], return_exceptions=True)
        shutil.rmtree(run_folder, ignore_errors=True)


def raw_connection(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)
