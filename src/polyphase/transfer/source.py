"""Blocks of one peer as an engine reads them: named by number and generation, copied into memory of its own."""

from __future__ import annotations

from collections.abc import Sequence

from polyphase.core.errors import ForeignDescriptor
from polyphase.transfer.blocks import BlockMemory
from polyphase.transfer.session import Session
from polyphase.wire.transfer import RegionCard

READ_TIMEOUT_S = 10.0


class PeerBlocks:
    """One region of a peer; implements `engines.interface.BlockSource`. Any thread. Owner of the session: whoever made this."""

    def __init__(self, session: Session, region: RegionCard, timeout_s: float = READ_TIMEOUT_S) -> None:
        self.session = session
        self._region = session.region(region)
        self._timeout_s = timeout_s

    def read_blocks(self, block_ids: Sequence[int], generations: Sequence[int], into: BlockMemory, places: Sequence[int]) -> bytes:
        """Copy whole blocks into the blocks `places` of `into`, on the calling thread.

        Returns: one `Verdict` for each block; only those that are DONE may be used.
        Raises: TransferError if the arguments do not fit, or the two memories cannot be joined.
        """
        agent = self.session.agent
        source = self.session.blocks(self._region.region_id, block_ids, generations)
        region = agent.region_of(into)
        if region is not None:
            return self.session.fetch(source, region.blocks(places), self._timeout_s).verdicts
        with agent.register(into) as region:
            return self.session.fetch(source, region.blocks(places), self._timeout_s).verdicts


def region_of_offer(region: RegionCard | None, region_id: str) -> RegionCard:
    """Raises: ForeignDescriptor if an offer does not describe the region that it names."""
    if region is None:
        raise ForeignDescriptor(f"the offer names region {region_id}, which its agent's card does not describe")
    return region
