"""Decides how blocks of several source ranks become blocks of one target rank. Counts only: no bytes, no numpy.

Tokens count through the sequence, so with block sizes of 16 and 24 the picture repeats every 48 tokens:

    source   |       0       |       1       |       2       |
    target   |           0           |           1           |
    pieces   |  0>0  16      | 1>0 8 | 1>1 8 |   2>1  16     |

Each piece is that, for the heads that one source rank gives: it names its place in the first period and is repeated for all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from polyphase.core.errors import TransferRefused
from polyphase.wire.layout import KvShape

CONVERTIBLE = {"float32", "float16", "bfloat16"}


@dataclass(frozen=True, slots=True)
class Piece:
    """A box that is copied from one block to another: some tokens and some heads, all of the other axes."""

    source: int  # place of the source rank in the plan's `sources`
    source_block: int  # within the period
    target_block: int
    source_token: int  # within its block
    target_token: int
    token_count: int
    source_head: int  # within the rank's heads
    target_head: int
    head_count: int


@dataclass(frozen=True, slots=True)
class Plan:
    """`pieces` of one period of `source_period` source blocks and `target_period` target blocks."""

    sources: tuple[KvShape, ...]  # those that are needed, in the order of `Piece.source`
    target: KvShape
    pieces: tuple[Piece, ...]
    source_period: int
    target_period: int

    @property
    def is_copy(self) -> bool:
        """Whether blocks can be copied byte by byte, and this plan is not needed."""
        (source, *others) = self.sources
        same = (source.dtype, source.block_size, source.heads, source.order)
        return not others and same == (self.target.dtype, self.target.block_size, self.target.heads, self.target.order)

    def source_block_count(self, token_count: int) -> int:
        """Blocks that have to be read from each of the sources."""
        return -(-token_count // self.sources[0].block_size)

    def target_block_count(self, token_count: int) -> int:
        return -(-token_count // self.target.block_size)


def plan(sources: Sequence[KvShape], target: KvShape) -> Plan:
    """How `target`'s blocks are put together from those of `sources`: ranks of one model instance, in any order.

    Ranks that give nothing new are left out, so that nothing is read twice.

    Raises: TransferRefused with the reason if it cannot be done: another model, heads that nobody holds, dtypes that need scales.
    """
    target.check()
    if not sources:
        raise TransferRefused("there is no source rank to read KV from")
    for source in sources:
        source.check()
        _check_pair(source, target)
    if len({source.block_size for source in sources}) > 1:
        raise TransferRefused("the source ranks have different block sizes, so they do not belong to one instance")
    givers = _givers(sources, target)
    used = sorted({place for place, _ in givers})
    numbers = {place: number for number, place in enumerate(used)}
    period = math.lcm(sources[0].block_size, target.block_size)
    spans = _token_spans(sources[0].block_size, target.block_size, period)
    pieces = [
        Piece(
            numbers[place],
            *span,
            source_head=sources[place].heads.index(run.start),
            target_head=target.heads.index(run.start),
            head_count=len(run),
        )
        for place, run in givers
        for span in spans
    ]
    return Plan(
        sources=tuple(sources[place] for place in used),
        target=target,
        pieces=tuple(pieces),
        source_period=period // sources[0].block_size,
        target_period=period // target.block_size,
    )


def _check_pair(source: KvShape, target: KvShape) -> None:
    for what in ("model", "family", "layer_count", "head_count", "head_dim"):
        theirs, ours = getattr(source, what), getattr(target, what)
        if theirs != ours:
            raise TransferRefused(f"the source's KV has {what} {theirs!r}, the target's {ours!r}: they are not of one model")
    if source.dtype != target.dtype and not {source.dtype, target.dtype} <= CONVERTIBLE:
        raise TransferRefused(f"KV of {source.dtype} cannot become {target.dtype}: quantised numbers mean nothing without their scales")


def _givers(sources: Sequence[KvShape], target: KvShape) -> list[tuple[int, range]]:
    """For each run of the target's heads, who gives it: (place in sources, heads). Raises: TransferRefused if somebody is missing."""
    givers: list[tuple[int, range]] = []
    head = target.heads.start
    while head < target.heads.stop:
        place = next((place for place, source in enumerate(sources) if head in source.heads), None)
        if place is None:
            held = ", ".join(f"{source.heads.start} to {source.heads.stop - 1}" for source in sources)
            raise TransferRefused(f"no source rank holds KV head {head}; they hold {held}")
        end = min(target.heads.stop, sources[place].heads.stop)
        givers.append((place, range(head, end)))
        head = end
    return givers


def _token_spans(source_size: int, target_size: int, period: int) -> list[tuple[int, int, int, int, int]]:
    """(source block, target block, source token, target token, count), as long as both stay within one block."""
    spans = []
    token = 0
    while token < period:
        count = min(source_size - token % source_size, target_size - token % target_size)
        spans.append((token // source_size, token // target_size, token % source_size, token % target_size, count))
        token += count
    return spans
