"""What a worker says to its peers, and what it owes those that did not read: each of their requests still ends in one message.

queued      on its way
not read    its queue is full, because it stands still: its requests are given up, and it is told so when it reads again
gone        nobody is there to be told
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from polyphase.core.errors import ConnectionLost
from polyphase.runtime import Delivery, PeerId, WorkerServer
from polyphase.wire.requests import FinishReason, SequenceOutput, StepOutputs, WireFailure

MAX_PEERS_OWED = 256
FORGET_AFTER_S = 60.0


class Outbox:
    """Used on one event loop."""

    def __init__(self, server: WorkerServer, worker_id: str, epoch: int) -> None:
        self._server = server
        self._worker_id = worker_id
        self._epoch = epoch
        self._last_sent_s: dict[PeerId, float] = {}
        self._owed: dict[PeerId, dict[str, None]] = {}  # requests whose end the peer does not know
        self.step = 0  # of the engine, told with each message

    def send(self, peer: PeerId, outputs: list[SequenceOutput]) -> bool:
        """False: it will not get this, nor anything else of its requests, but their end if it reads again."""
        self._last_sent_s[peer] = time.monotonic()
        delivery = self._server.send(peer, StepOutputs(self._worker_id, self._epoch, self.step, outputs))
        if delivery:
            return True
        self._last_sent_s.pop(peer, None)
        if delivery is Delivery.NOT_READ and (peer in self._owed or len(self._owed) < MAX_PEERS_OWED):
            self._owed.setdefault(peer, {}).update(dict.fromkeys(output.request_id for output in outputs))
        return False

    def owe(self, peer: PeerId, request_ids: Iterable[str]) -> None:
        """These were given up because the peer did not read. Nothing is owed to one that has gone."""
        if peer in self._owed:
            self._owed[peer].update(dict.fromkeys(request_ids))

    def settle(self) -> None:
        """Tell those that read again; called now and then."""
        message = f"worker {self._worker_id} gave the request up: its answers were not read"
        failure = WireFailure(ConnectionLost.code, message, ConnectionLost.is_retryable)
        for peer, owed in list(self._owed.items()):
            ends = [SequenceOutput(request_id=request_id, finish_reason=FinishReason.ERROR, failure=failure) for request_id in owed]
            if self._server.send(peer, StepOutputs(self._worker_id, self._epoch, self.step, ends)) is not Delivery.NOT_READ:
                del self._owed[peer]

    def unheard(self, peers: Iterable[PeerId], interval_s: float) -> list[PeerId]:
        """Those that were sent nothing for so long."""
        now_s = time.monotonic()
        self._last_sent_s = {peer: sent_s for peer, sent_s in self._last_sent_s.items() if now_s - sent_s < FORGET_AFTER_S}
        return [peer for peer in peers if now_s - self._last_sent_s.get(peer, 0.0) >= interval_s]
