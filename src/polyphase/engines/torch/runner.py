"""Runs the model over one packed batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from polyphase.engines.torch.attention import PackedAttention
from polyphase.engines.torch.batch import BatchPacker, PackedRow
from polyphase.engines.torch.hook import InterruptibleAttention, attending
from polyphase.engines.torch.lora import Adapters, StepAdapters, adapting
from polyphase.engines.torch.storage import KvStorage
from polyphase.engines.torch.tracing import make_forward


class ModelRunner:
    """Writes the rows' KV to their blocks and returns logits. Used by one thread at a time."""

    def __init__(self, model: PreTrainedModel, storage: KvStorage, device: torch.device, adapters: Adapters | None = None) -> None:
        self._forward = make_forward(model, device)
        self._storage = storage
        self._adapters = adapters
        self._device = device
        self._packer = BatchPacker(storage.layout, device)

    def forward(
        self, rows: Sequence[PackedRow], is_sampled: Sequence[bool], is_interrupted: Callable[[], bool]
    ) -> tuple[Tensor, list[int]]:
        """
        Returns: logits [sampled rows, vocab], and for each of them the index of its row in `rows`.
        Raises: something, at the next layer, once `is_interrupted` says so.
        """
        with torch.inference_mode():
            batch = self._packer.pack(rows)
            sampled = [(row, last) for row, last in zip(batch.order, batch.last_tokens, strict=True) if is_sampled[row]]
            keep = torch.tensor([last for _, last in sampled], dtype=torch.int64, device=self._device)
            attention = InterruptibleAttention(PackedAttention(self._storage, batch), is_interrupted)
            with attending(attention), adapting(self._step_adapters([rows[place] for place in batch.order])):
                logits = self._forward(batch.input_ids, batch.position_ids, keep)
        return logits[0], [row for row, _ in sampled]

    def _step_adapters(self, packed: Sequence[PackedRow]) -> StepAdapters | None:
        if self._adapters is None:
            return None
        return self._adapters.step([row.adapter for row in packed], [len(row.token_ids) for row in packed], self._device)

    def close(self) -> None:
        """Let go of the model and of the blocks' memory."""
        del self._forward, self._storage
