"""Tells other workers that what they offered has been fetched, or is not wanted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict

from polyphase.core.errors import WorkerLost
from polyphase.runtime import Repeats, WorkerClient
from polyphase.wire.kv import Offer
from polyphase.wire.requests import ReleaseLease

log = logging.getLogger(__name__)

IDLE_S = 30.0
MAX_CONNECTIONS = 64


class LeaseReleases:
    """Connections to workers that made offers, by endpoint; `run` as a task. What was sent before a connection broke is sent again."""

    def __init__(self, name: str) -> None:
        self._client = WorkerClient(lambda _: None, name, on_cut=self._on_cut)
        self._last_use_s: OrderedDict[str, float] = OrderedDict()
        self._repeats = Repeats()

    async def run(self) -> None:
        """Notice connections that break, until cancelled."""
        await self._client.run()

    def send(self, offer: Offer) -> None:
        message = ReleaseLease(offer.lease_id)
        self._repeats.note(offer.endpoint, message)
        self._send(offer.endpoint, message)
        if len(self._last_use_s) > MAX_CONNECTIONS:
            self._forget(next(iter(self._last_use_s)))

    def _send(self, endpoint: str, message: ReleaseLease) -> None:
        try:
            if endpoint not in self._last_use_s:
                self._client.connect(endpoint, endpoint)
            self._last_use_s[endpoint] = time.monotonic()
            self._last_use_s.move_to_end(endpoint)
            self._client.send(endpoint, message)
        except WorkerLost as error:
            log.info("lease %s is left to run out: %s", message.lease_id, error)
            self._forget(endpoint)

    def _on_cut(self, endpoint: str) -> None:
        # Not at once: this is called by the connection that is to be closed.
        asyncio.get_running_loop().call_soon(self._send_again, endpoint)

    def _send_again(self, endpoint: str) -> None:
        self._forget(endpoint)
        for message in self._repeats.of(endpoint):
            if isinstance(message, ReleaseLease):
                self._send(endpoint, message)

    def close_idle(self) -> None:
        """Close connections that were not used for half a minute; called now and then."""
        oldest_s = time.monotonic() - IDLE_S
        for endpoint in [endpoint for endpoint, used_s in self._last_use_s.items() if used_s < oldest_s]:
            self._forget(endpoint)

    def _forget(self, endpoint: str) -> None:
        self._last_use_s.pop(endpoint, None)
        self._client.disconnect(endpoint)

    def close(self) -> None:
        self._client.close()
