"""Tells other workers that what they offered has been fetched, or is not wanted."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict

from polyphase.core.errors import WorkerLost
from polyphase.runtime import WorkerClient
from polyphase.wire.kv import Offer
from polyphase.wire.requests import ReleaseLease

log = logging.getLogger(__name__)

IDLE_S = 30.0
MAX_CONNECTIONS = 64


class LeaseReleases:
    """Connections to workers that made offers, by endpoint. What cannot be delivered is left to the lease's own end."""

    def __init__(self, name: str) -> None:
        self._client = WorkerClient(lambda _: None, name)
        self._last_use_s: OrderedDict[str, float] = OrderedDict()

    def send(self, offer: Offer) -> None:
        endpoint = offer.endpoint
        try:
            if endpoint not in self._last_use_s:
                self._client.connect(endpoint, endpoint)
            self._last_use_s[endpoint] = time.monotonic()
            self._last_use_s.move_to_end(endpoint)
            self._client.send(endpoint, ReleaseLease(offer.lease_id))
        except WorkerLost as error:
            log.info("lease %s is left to run out: %s", offer.lease_id, error)
            self._forget(endpoint)
        if len(self._last_use_s) > MAX_CONNECTIONS:
            self._forget(next(iter(self._last_use_s)))

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
