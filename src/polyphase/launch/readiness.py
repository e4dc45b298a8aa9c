"""Whether a deployment can serve: its workers have joined the registry, and every frontend knows all of them and says healthy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from polyphase.launch.supervisor import StartFailed
from polyphase.runtime import Registry

TIMEOUT_S = 2.0


class ReadinessProbe:
    """An async context manager, called until it says true."""

    def __init__(self, urls: Sequence[str], run_folder: Path, worker_ids: Collection[str]) -> None:
        self._urls = urls
        self._registry = Registry(run_folder)
        self._expected = frozenset(worker_ids)
        self._client = httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False)

    async def __call__(self) -> bool:
        """Raises: StartFailed if the frontend will send a worker nothing."""
        if not self._expected <= self.joined_worker_ids():
            return False
        try:
            answers = [await self._client.get(f"{url}/health") for url in self._urls]
        except httpx.HTTPError:
            return False
        pages = [answer.json() for answer in answers]
        for page in pages:
            for worker_id, reason in page.get("turned_away", {}).items():
                if worker_id in self._expected:
                    raise StartFailed(reason)
        return all(answer.status_code == 200 for answer in answers) and all(self._expected <= _worker_ids(page) for page in pages)

    def joined_worker_ids(self) -> set[str]:
        return {entry.worker_id for entry in self._registry.entries()}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._client.aclose()


def _worker_ids(health: Any) -> set[str]:
    """Workers in the body of /health, over all models."""
    models: dict[str, Any] = health.get("models", {})
    return {worker_id for model in models.values() for worker_id in model.get("workers", {})}
