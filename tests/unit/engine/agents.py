"""Two engines in one process whose transfer agents have met, as those of two workers would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from polyphase.engines.interface import KvExporter
from polyphase.transfer import Agent, PeerBlocks
from polyphase.transfer.agent import default_backends
from polyphase.transfer.backends.interface import Backend


class AgentPair:
    """`source` reads the blocks of `prefill`; both may be the same engine. Owner: the test, by `close`."""

    def __init__(self, prefill: KvExporter, decode: KvExporter, backends: Callable[[], Sequence[Backend]] = default_backends) -> None:
        self._stack = ExitStack()
        lender = self._stack.enter_context(Agent("prefill-0", backends=backends(), epoch=1))
        reader = self._stack.enter_context(Agent("decode-0", backends=backends(), epoch=1))
        region = lender.register(prefill.kv_memory, prefill.kv_layout)
        reader.register(decode.kv_memory, decode.kv_layout)
        card = lender.card_with(region.card)
        prefill.bind_offers(worker_id="prefill-0", epoch=1, endpoint="ipc://prefill", agent=card, region_id=region.region_id)
        self.session = self._stack.enter_context(reader.connect(card))
        self.source = PeerBlocks(self.session, region.card)

    def close(self) -> None:
        """Idempotent."""
        self._stack.close()
