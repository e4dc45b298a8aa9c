"""Attention over the paged cache: new keys and values go to their slots, then every token sees those of its own sequence.

    a token at position p sees the positions from max(0, p - window + 1) to p

`PackedAttention` is what serves; `PlainAttention` does the same naively and is what it is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from polyphase.engines.torch.batch import Batch, DecodeGroup, Span
from polyphase.engines.torch.merging import can_merge, merged_attention
from polyphase.engines.torch.storage import KvStorage


class PackedAttention:
    """As few and as large operations as the packing allows."""

    def __init__(self, storage: KvStorage, batch: Batch) -> None:
        self._pages = storage.pages
        self._slots = storage.slots
        self._block_size = storage.layout.block_size
        self._can_merge = can_merge(storage.slots.device.type, storage.slots.dtype)
        self._batch = batch
        self._slot_rows = batch.slot_rows.unbind(0)
        self._group_rows = [group.page_rows.unbind(0) for group in batch.groups]
        self._span_rows = [None if span.page_rows is None else span.page_rows.unbind(0) for span in batch.spans]
        self._masks: dict[tuple[str, int, int | None], Tensor | None] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
        self._write(layer, key, value)
        parts = [
            self._decode(group, rows[layer], i, query, scaling, window)
            for i, (group, rows) in enumerate(zip(self._batch.groups, self._group_rows, strict=True))
        ]
        for i, (span, span_rows) in enumerate(zip(self._batch.spans, self._span_rows, strict=True)):
            mine, own_key, own_value = (tensor[:, :, span.first : span.end] for tensor in (query, key, value))
            if span_rows is None:
                parts.append(self._fresh(span, i, mine, own_key, own_value, scaling, window))
            else:
                parts.append(self._chunk(span, span_rows[layer], i, mine, own_key, own_value, scaling, window))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _write(self, layer: int, key: Tensor, value: Tensor) -> None:
        key_rows, value_rows = self._slot_rows[layer]
        width = self._slots.shape[1]
        self._slots.index_copy_(0, key_rows, key[0].transpose(0, 1).reshape(-1, width))
        self._slots.index_copy_(0, value_rows, value[0].transpose(0, 1).reshape(-1, width))

    def _read(self, rows: Tensor, sequence_count: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """Keys and values [sequences, kv_heads, tokens, head_dim] of whole blocks."""
        pages = self._pages.index_select(0, rows)
        kv_heads = self._slots.shape[1] // head_dim
        keys, values = pages.view(2, sequence_count, -1, kv_heads, head_dim).transpose(2, 3).unbind(0)
        return keys, values

    def _decode(self, group: DecodeGroup, rows: Tensor, place: int, query: Tensor, scaling: float | None, window: int | None) -> Tensor:
        """One query per sequence: the query heads that share a key head take the place of the query positions."""
        count = group.end - group.first
        heads, head_dim = query.shape[1], query.shape[3]
        keys, values = self._read(rows, count, head_dim)
        if count == 1:  # no padding but the end of the last block
            keys, values = keys[:, :, : group.lengths[0]], values[:, :, : group.lengths[0]]
        mine = query[0, :, group.first : group.end].transpose(0, 1).reshape(count, keys.shape[1], -1, head_dim)
        mask = self._decode_mask(group, place, query.dtype, window)
        found = scaled_dot_product_attention(mine, keys, values, attn_mask=mask, scale=scaling)
        return found.reshape(1, count, heads, head_dim)

    def _fresh(
        self, span: Span, place: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """A whole prompt, or the beginning of one: its keys are at hand."""
        if window is not None and window < span.length:
            return self._masked(query, key, value, span, place, scaling, window)
        found = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
        return found.transpose(1, 2)

    def _chunk(
        self, span: Span, rows: Tensor, place: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """Tokens that follow on what the cache holds."""
        keys, values = self._read(rows, 1, query.shape[3])
        if self._can_merge and (window is None or window >= span.length):
            past = span.length - span.count
            return merged_attention(query, (keys[:, :, :past], values[:, :, :past]), (key, value), scaling).transpose(1, 2)
        keys, values = keys[:, :, : span.length], values[:, :, : span.length]
        return self._masked(query, keys, values, span, place, scaling, window)

    def _masked(
        self, query: Tensor, keys: Tensor, values: Tensor, span: Span, place: int, scaling: float | None, window: int | None
    ) -> Tensor:
        """With a mask, kernels want as many query heads as key heads: the heads that share one are laid behind one another."""
        _, heads, count, head_dim = query.shape
        sharing = heads // keys.shape[1]
        query = query.reshape(1, keys.shape[1], sharing * count, head_dim)
        mask = self._span_mask(span, place, sharing, query.dtype, window)
        found = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
        return found.reshape(1, heads, count, head_dim).transpose(1, 2)

    def _decode_mask(self, group: DecodeGroup, place: int, dtype: torch.dtype, window: int | None) -> Tensor | None:
        """[sequences, 1, 1, tokens], zero where a key is seen and minus infinity elsewhere; the same for every layer."""
        key = ("decode", place, window)
        if key not in self._masks:
            self._masks[key] = self._make_decode_mask(group, dtype, window)
        return self._masks[key]

    def _make_decode_mask(self, group: DecodeGroup, dtype: torch.dtype, window: int | None) -> Tensor | None:
        longest = group.lengths[0]
        width = longest if len(group.lengths) == 1 else group.table_width * self._block_size
        is_windowed = window is not None and window < longest
        if group.lengths[-1] == width and not is_windowed:
            return None
        device = self._slots.device
        positions = torch.arange(width, device=device)
        lengths = torch.tensor(group.lengths, device=device)[:, None]
        is_hidden = positions >= lengths
        if window is not None:
            is_hidden |= positions < lengths - window
        return torch.zeros(is_hidden.shape, dtype=dtype, device=device).masked_fill_(is_hidden, -torch.inf)[:, None, None, :]

    def _span_mask(self, span: Span, place: int, sharing: int, dtype: torch.dtype, window: int | None) -> Tensor:
        """[sharing · new tokens, tokens], zero where a key is seen and minus infinity elsewhere; the same for every layer."""
        key = ("span", place, window)
        mask = self._masks.get(key)
        if mask is None:
            mask = torch.zeros((span.count, span.length), dtype=dtype, device=self._slots.device)
            mask = mask.masked_fill_(_hidden(span, window, mask.device), -torch.inf).repeat(sharing, 1)
            self._masks[key] = mask
        return mask


class PlainAttention:
    """The same, one sequence and one softmax at a time: what `PackedAttention` is tested against."""

    def __init__(self, storage: KvStorage, batch: Batch) -> None:
        self._storage = storage
        self._batch = batch

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
        slots, pages = self._storage.slots, self._storage.pages
        kv_heads, token_count, head_dim = key.shape[1:]
        for token in range(token_count):
            for which, new in enumerate((key, value)):
                slots[int(self._batch.slot_rows[layer, which, token])] = new[0, :, token].reshape(-1)
        out = torch.empty_like(query.transpose(1, 2))
        for first, end, length, rows in self._sequences(layer):
            table = pages[rows].view(2, -1, kv_heads, head_dim)[:, :length]
            keys, values = table.repeat_interleave(query.shape[1] // kv_heads, dim=2).unbind(0)
            for token in range(first, end):
                last = length - (end - token)
                seen = slice(0 if window is None else max(0, last - window + 1), last + 1)
                scores = torch.einsum("hd,thd->ht", query[0, :, token], keys[seen]) * (scaling or head_dim**-0.5)
                out[0, token] = torch.einsum("ht,thd->hd", scores.softmax(dim=-1), values[seen])
        return out

    def _sequences(self, layer: int) -> list[tuple[int, int, int, Tensor]]:
        found: list[tuple[int, int, int, Tensor]] = []
        for group in self._batch.groups:
            tables = group.page_rows[layer].view(2, -1, group.table_width)
            found += [(group.first + i, group.first + i + 1, length, tables[:, i].reshape(-1)) for i, length in enumerate(group.lengths)]
        size = self._storage.layout.block_size
        for span in self._batch.spans:
            if span.page_rows is not None:
                rows = span.page_rows[layer]
            else:  # not read by the packed attention; found again from where the tokens were written
                rows = self._batch.slot_rows[layer, :, span.first : span.end : size].reshape(-1) // size
            found.append((span.first, span.end, span.length, rows))
        return found


def _hidden(span: Span, window: int | None, device: torch.device) -> Tensor:
    keys = torch.arange(span.length, device=device)
    queries = torch.arange(span.length - span.count, span.length, device=device)[:, None]
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    return hidden
