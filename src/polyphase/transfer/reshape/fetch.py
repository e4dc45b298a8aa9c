"""Reads blocks of one or several source ranks and puts the target's together, a stretch of tokens at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence

from polyphase.core.errors import ForeignDescriptor, TransferRefused
from polyphase.transfer.blocks import HostMemory, LocalBlocks, RemoteBlocks
from polyphase.transfer.region import Region
from polyphase.transfer.reshape.apply import apply
from polyphase.transfer.reshape.plan import Plan, plan
from polyphase.transfer.verdicts import Verdict
from polyphase.wire.layout import KvShape
from polyphase.wire.transfer import RegionCard

STAGING_BYTES = 32 << 20  # for each source rank


def plan_regions(sources: Sequence[RegionCard], target: Region) -> Plan:
    """To be called when agents meet: how blocks of the peers' regions become the target's.

    Raises: TransferRefused with the reason if they cannot.
    """
    shapes: list[KvShape] = []
    for card in (*sources, target.card):
        if card.shape is None:
            raise TransferRefused(f"region {card.region_id} was registered without the shape of its blocks")
        shapes.append(card.shape)
    return plan(shapes[:-1], shapes[-1])


def fetch(made: Plan, sources: Sequence[RemoteBlocks], into: LocalBlocks, token_count: int, timeout_s: float) -> bytes:
    """Fill the target's blocks with the first `token_count` tokens of a sequence, on the calling thread.

    Args:
        sources: for each of `made.sources`, its blocks of the sequence, in order.
        into: the target blocks, in order, `made.target_block_count(token_count)` of them.

    Returns: a `Verdict` for each target block; DONE if all the source blocks that it is made of were.
    Raises: ForeignDescriptor if the lists do not fit; ConfigurationError without numpy.
    """
    source_count, target_count = made.source_block_count(token_count), made.target_block_count(token_count)
    if [len(blocks) for blocks in sources] != [source_count] * len(made.sources) or len(into) != target_count:
        raise ForeignDescriptor(
            f"{token_count} tokens are {source_count} blocks of each of {len(made.sources)} source ranks and {target_count} target blocks; "
            f"{[len(blocks) for blocks in sources]} and {len(into)} were given"
        )
    deadline_s = time.monotonic() + timeout_s
    period_tokens = made.source_period * made.sources[0].block_size
    period_bytes = made.source_period * max(shape.block_bytes for shape in made.sources)
    stretch_tokens = period_tokens * max(1, STAGING_BYTES // period_bytes)
    verdicts = bytearray()
    for start in range(0, token_count, stretch_tokens):
        count = min(stretch_tokens, token_count - start)
        from_block, to_block = start // made.sources[0].block_size, start // made.target.block_size
        parts = [blocks[from_block : from_block + made.source_block_count(count)] for blocks in sources]
        part_into = into[to_block : to_block + made.target_block_count(count)]
        verdicts += _fetch_stretch(made, parts, part_into, count, max(0.0, deadline_s - time.monotonic()))
    return bytes(verdicts)


def _fetch_stretch(made: Plan, sources: list[RemoteBlocks], into: LocalBlocks, token_count: int, timeout_s: float) -> bytes:
    staged: list[memoryview] = []
    found: list[bytes] = []
    agent = into.region.agent
    for blocks, shape in zip(sources, made.sources, strict=True):
        staging = HostMemory(bytearray(len(blocks) * shape.block_bytes), shape.block_bytes)
        with agent.register(staging) as region:
            found.append(blocks.session.fetch(blocks, region.blocks(range(len(blocks))), timeout_s).verdicts)
        staged.append(staging.blocks)
    into.region.enter(into)
    try:
        apply(made, staged, into.region.host_blocks.blocks, list(into.ids), token_count)
    finally:
        into.region.leave(into)
    verdicts = bytearray([Verdict.DONE]) * len(into)
    for piece in made.pieces:
        for period in range(-(-len(into) // made.target_period)):
            target = period * made.target_period + piece.target_block
            source = period * made.source_period + piece.source_block
            if target < len(into) and source < len(found[piece.source]) and found[piece.source][source] != Verdict.DONE:
                verdicts[target] = found[piece.source][source]
    return bytes(verdicts)
