"""Packs the rows of a step into tensors: one row of tokens for the model, and for the attention where to write and what to read.

    packed tokens   | B decodes | D decodes | A: a whole prompt | C: a chunk |        T tokens
                    ├── decode groups ──────┤── spans ───────────────────────┤
    positions       | 41        | 18        | 0 1 2 … 7         | 16 17 18   |

Rows that compute one token come first, longest context first, cut into groups of similar length: a group is one attention call over a
padded table. Every other row is a span of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from polyphase.wire.kv import KvLayout

# A further group costs a few dozen µs in each layer; padding costs the reading of blocks that are then ignored.
_GROUP_PADDING_LIMIT = 64  # blocks of padding in a group that are never worth another group
_GROUP_PADDING_SHARE = 0.25  # of the group's blocks


@dataclass(frozen=True, slots=True)
class PackedRow:
    """`token_ids` at positions `start` and following, of a sequence whose blocks are `block_ids` (int64, a buffer)."""

    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]
    adapter: str | None = None

    @property
    def length(self) -> int:
        """Tokens that the last token of the row sees, itself included."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Packed tokens `first` to `end`, each the last one of its sequence."""

    first: int
    end: int
    lengths: tuple[int, ...]  # longest first
    table_width: int  # blocks
    page_rows: Tensor  # int64[layer, 2 · sequences · table_width]: all keys, then all values


@dataclass(frozen=True, slots=True)
class Span:
    """Packed tokens `first` to `end` of one sequence, of which `length` tokens are known to the cache after this step."""

    first: int
    end: int
    length: int
    page_rows: Tensor | None  # int64[layer, 2 · blocks]; None: the span is all that there is, nothing to be read

    @property
    def count(self) -> int:
        return self.end - self.first


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's tensors. `order[i]` is the index, in the rows given, of the i-th packed row."""

    order: list[int]
    input_ids: Tensor  # int64[1, T]
    position_ids: Tensor  # int64[1, T]
    last_tokens: list[int]  # packed index of the last token of each packed row
    slot_rows: Tensor  # int64[layer, 2, T]: where each token's key and value go
    groups: list[DecodeGroup]
    spans: list[Span]


class BatchPacker:
    """Knows the layout and the device; keeps no state between steps."""

    def __init__(self, layout: KvLayout, device: torch.device) -> None:
        self._block_size = layout.block_size
        self._device = device
        # Row numbers of block b, layer l, keys (0) or values (1) are affine in each: pages 2·L·b + 2·l + kv, slots that times block_size.
        self._pages_per_block = 2 * layout.layer_count
        self._page_offsets = np.arange(2 * layout.layer_count).reshape(layout.layer_count, 2)

    def pack(self, rows: Sequence[PackedRow]) -> Batch:
        singles = [i for i, row in enumerate(rows) if len(row.token_ids) == 1]
        singles.sort(key=lambda i: rows[i].length, reverse=True)
        order = singles + [i for i, row in enumerate(rows) if len(row.token_ids) != 1]
        packed = [rows[i] for i in order]
        ends = np.cumsum([len(row.token_ids) for row in packed]).tolist()
        token_ids = [token_id for row in packed for token_id in row.token_ids]
        positions, slots = self._positions_and_slots(packed, len(singles))
        slot_rows = self._page_offsets[:, :, None] * self._block_size + slots
        return Batch(
            order=order,
            input_ids=self._tensor(np.array([token_ids], dtype=np.int64)),
            position_ids=self._tensor(positions[None, :]),
            last_tokens=[end - 1 for end in ends],
            slot_rows=self._tensor(slot_rows),
            groups=[self._group(packed, first, end) for first, end in _group_bounds(packed[: len(singles)], self._block_size)],
            spans=[
                self._span(row, end - len(row.token_ids), end)
                for row, end in zip(packed[len(singles) :], ends[len(singles) :], strict=True)
            ],
        )

    def _positions_and_slots(self, packed: list[PackedRow], single_count: int) -> tuple[np.ndarray, np.ndarray]:
        """Position of each token, and its slot in layer 0's keys."""
        size = self._block_size
        positions = [np.array([row.start for row in packed[:single_count]], dtype=np.int64)]
        blocks = [np.array([row.block_ids[row.start // size] for row in packed[:single_count]], dtype=np.int64)]
        for row in packed[single_count:]:
            span = np.arange(row.start, row.length)
            positions.append(span)
            blocks.append(np.asarray(row.block_ids, dtype=np.int64)[span // size])
        position = np.concatenate(positions)
        return position, np.concatenate(blocks) * (self._pages_per_block * size) + position % size

    def _group(self, packed: list[PackedRow], first: int, end: int) -> DecodeGroup:
        width = _block_count(packed[first].length, self._block_size)
        table = np.empty((end - first, width), dtype=np.int64)
        for line, row in zip(table, packed[first:end], strict=True):
            count = _block_count(row.length, self._block_size)
            ids = np.asarray(row.block_ids, dtype=np.int64)
            line[:count] = ids[:count]
            line[count:] = ids[0]  # padding reads the sequence's own first block: nobody else's values, however odd, can leak in
        return DecodeGroup(first, end, tuple(row.length for row in packed[first:end]), width, self._page_rows(table.reshape(-1)))

    def _span(self, row: PackedRow, first: int, end: int) -> Span:
        if row.start == 0:
            return Span(first, end, row.length, None)
        ids = np.asarray(row.block_ids, dtype=np.int64)[: _block_count(row.length, self._block_size)]
        return Span(first, end, row.length, self._page_rows(ids))

    def _page_rows(self, block_ids: np.ndarray) -> Tensor:
        rows = self._page_offsets[:, :, None] + block_ids * self._pages_per_block
        return self._tensor(rows.reshape(len(rows), -1))

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)


def _group_bounds(singles: Sequence[PackedRow], block_size: int) -> list[tuple[int, int]]:
    """Cut rows, longest first, into runs in which padding to the run's first row wastes little."""
    bounds: list[tuple[int, int]] = []
    first, padding, used = 0, 0, 0
    for i, row in enumerate(singles):
        count = _block_count(row.length, block_size)
        missing = _block_count(singles[first].length, block_size) - count
        if padding + missing > max(_GROUP_PADDING_LIMIT, _GROUP_PADDING_SHARE * (used + count)):
            bounds.append((first, i))
            first, padding, used, missing = i, 0, 0, 0
        padding += missing
        used += count
    if singles:
        bounds.append((first, len(singles)))
    return bounds


def _block_count(token_count: int, block_size: int) -> int:
    return -(-token_count // block_size)
