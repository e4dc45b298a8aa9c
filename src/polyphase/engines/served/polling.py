"""Asks a server for the page that holds its load, twice a second."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import httpx

from polyphase.core.errors import EngineFailed, WireError
from polyphase.engines.served.dialect import Gauges, Sink

log = logging.getLogger(__name__)

INTERVAL_S = 0.5
TIMEOUT_S = 2.0
MAX_UNREACHABLE = 6  # in a row: it has gone. One that only does not answer may be busy, or hang, which is seen by its steps


class LoadPoll:
    """Implements `Observer`."""

    def __init__(self, engine: str, path: str, gauges_of: Callable[[bytes], Gauges], interval_s: float = INTERVAL_S) -> None:
        """`gauges_of` reads the page and may raise WireError: then the last figures stay."""
        self._engine = engine
        self._path = path
        self._gauges_of = gauges_of
        self._interval_s = interval_s

    async def watch(self, client: httpx.AsyncClient, sink: Sink) -> None:
        unreachable = 0
        while True:
            try:
                response = await client.get(self._path, timeout=TIMEOUT_S)
                if response.status_code == 200:
                    sink.note_gauges(self._gauges_of(response.content))
                unreachable = 0
            except httpx.ConnectError as error:
                unreachable += 1
                if unreachable >= MAX_UNREACHABLE:
                    raise EngineFailed(f"{self._engine} at {client.base_url} cannot be reached any more: {error}") from None
            except (httpx.HTTPError, WireError) as error:
                log.debug("no load of %s: %s", self._engine, error)
            await asyncio.sleep(self._interval_s)
