"""What the bookkeeping asks of the memory of the KV blocks, and the copying of offered blocks into it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from polyphase.core.errors import TransferError
from polyphase.engines.batching.outcome import PullResult
from polyphase.engines.batching.scheduler import Pull
from polyphase.engines.interface import BlockSource
from polyphase.transfer import Verdict
from polyphase.wire.kv import KvLayout


class Generations(Protocol):
    """The generation of each block, where readers in other processes see it. `transfer.SharedPool` is one."""

    def generations(self, block_ids: Sequence[int]) -> list[int]: ...

    def renew(self, block_ids: Sequence[int]) -> None: ...


class BlockStorage(Protocol):
    """Blocks that one engine computes into."""

    @property
    def layout(self) -> KvLayout: ...

    @property
    def block_count(self) -> int: ...

    @property
    def shared(self) -> Generations | None:
        """None: no other process can read these blocks."""

    def read_from(self, source: BlockSource, block_ids: list[int], generations: list[int], into: Sequence[int]) -> bytes:
        """Copy offered blocks into the own blocks `into`.

        Returns: a `Verdict` for each; what is in the others than the DONE ones must not be used.
        Raises: TransferError; nothing that is in `into` may be used then.
        """

    def zero(self, block_ids: Sequence[int]) -> None:
        """Overwrite what the blocks hold."""


def pull_blocks(pull: Pull, storage: BlockStorage) -> PullResult:
    """Copy what was offered, up to the first block that did not arrive well; a failure is part of the result.

    Changes no bookkeeping, so that it may run in the engine's thread.
    """
    offer, source = pull.sequence.offer, pull.sequence.source
    assert offer is not None, "the scheduler plans pulls only for sequences with an offer"
    assert source is not None, "the scheduler plans pulls only for sequences with an opened source"
    started_ns = time.monotonic_ns()
    block_ids = offer.block_ids[pull.first_block : -(-pull.token_count // storage.layout.block_size)]
    end = pull.first_block + len(block_ids)
    error: str | None = None
    good_count = 0
    try:
        verdicts = storage.read_from(
            source,
            block_ids,
            offer.generations[pull.first_block : end],
            pull.sequence.blocks.block_ids[pull.first_block : end],
        )
        good_count = len(verdicts) - len(verdicts.lstrip(bytes([Verdict.DONE])))
        if good_count < len(block_ids):
            error = f"{len(block_ids)} blocks were offered, and block {good_count} of them is {Verdict(verdicts[good_count]).name}"
    except (TransferError, OSError, ValueError, BufferError) as failure:
        error = str(failure)
    duration_ms = (time.monotonic_ns() - started_ns) / 1e6
    token_count = min(pull.token_count, (pull.first_block + good_count) * storage.layout.block_size)
    return PullResult(pull, token_count, good_count * storage.layout.block_bytes, duration_ms, error)
