"""Looks after an attached server: asks it from time to time whether it is there, and opens the gate that its failures have closed."""

from __future__ import annotations

import asyncio
import logging
import math
import time

import httpx

from polyphase.engines.served.access import Access
from polyphase.engines.served.dialect import Sink
from polyphase.engines.served.gate import Gate

log = logging.getLogger(__name__)

NEAR_INTERVAL_S, FAR_INTERVAL_S = 1.0, 15.0  # on this machine, and elsewhere, where each question may count against a limit
OUTAGE_INTERVAL_S = 1.0
TICK_S = 0.5
TIMEOUT_S = 5.0
SILENCES = 2  # questions without an answer in a row: one may be lost, or the machine is busy


class LivenessObserver:
    """Implements `served.dialect.Observer`. A server that goes away is waited for: it is not ours to start."""

    def __init__(self, gate: Gate, path: str, access: Access, interval_s: float, timeout_s: float = TIMEOUT_S) -> None:
        self._gate = gate
        self._path = path
        self._access = access
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._silent_count = 0

    async def watch(self, client: httpx.AsyncClient, sink: Sink) -> None:
        """Until cancelled. Between questions the last answer counts: elsewhere they are rare, and frontends watch closely."""
        asked_s = -math.inf
        while True:
            before, now_s = self._gate.outage, time.monotonic()
            if now_s - asked_s >= (min(self._interval_s, OUTAGE_INTERVAL_S) if before else self._interval_s):
                asked_s = now_s
                await self._ask(client, sink)
            elif not before:
                sink.note_alive()
            if self._gate.outage and not before:
                log.warning("it gets no requests: %s", self._gate.outage)
            elif before and not self._gate.outage:
                log.info("it answers again")
            await asyncio.sleep(min(TICK_S, self._interval_s))

    async def _ask(self, client: httpx.AsyncClient, sink: Sink) -> None:
        try:
            response = await client.get(self._path, headers=self._access.headers(), timeout=self._timeout_s)
        except httpx.ConnectError as error:
            self._silent_count = SILENCES
            self._gate.close(f"the server cannot be reached: {error or type(error).__name__}", time.monotonic())
            sink.note_alive()
            return
        except httpx.HTTPError as error:
            self._silent_count += 1
            if self._silent_count >= SILENCES:
                self._gate.close(f"the server does not answer GET {self._path}: {error or type(error).__name__}", time.monotonic())
            return
        self._silent_count = 0
        if response.status_code < 500:
            self._gate.note_probe(time.monotonic())
            sink.note_alive()
        else:
            self._gate.note_failure(f"the server answers GET {self._path} with status {response.status_code}", time.monotonic())
