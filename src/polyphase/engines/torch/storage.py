"""The memory of the KV blocks, as tensors: in shared memory on the CPU, in device memory elsewhere.

    block     = [layer, 2 (keys, values), block_size, kv_heads, head_dim]     contiguous, as `wire.kv.KvLayout` says
    pages     = the same memory as rows of one layer's keys or values of one block: [block · layer · 2, block_size · kv_heads · head_dim]
    slots     = the same memory as rows of one token:                    [block · layer · 2 · block_size, kv_heads · head_dim]

So the attention reads whole pages and writes single slots, each with one indexed operation, and a transfer moves whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from polyphase.engines.batching.storage import BlockStorage
from polyphase.engines.interface import BlockSource
from polyphase.transfer import BlockMemory, SharedPool
from polyphase.transfer.device import CudaMemory, wait_for_device
from polyphase.wire.kv import KvLayout


class KvStorage(BlockStorage, Protocol):
    """Blocks that one engine computes into, as tensors."""

    pages: Tensor
    slots: Tensor

    @property
    def shared(self) -> BlockMemory:
        """What others read: to be registered with a transfer agent."""

    def settle(self) -> None:
        """Wait until what the calling thread has enqueued is in the blocks, so that others may read and write them."""

    def close(self) -> None: ...


class HostStorage:
    """Blocks in shared memory, where other workers on this host read them without our help."""

    def __init__(self, layout: KvLayout, block_count: int) -> None:
        self.layout = layout
        self.block_count = block_count
        self.shared = SharedPool.create(block_count, layout.block_bytes)
        blocks = torch.frombuffer(self.shared.blocks, dtype=torch.uint8).view(torch_dtype(layout))
        self.pages, self.slots = _views(blocks, layout)

    def read_from(self, source: BlockSource, block_ids: list[int], generations: list[int], into: Sequence[int]) -> bytes:
        return source.read_blocks(block_ids, generations, self.shared, into)

    def zero(self, block_ids: Sequence[int]) -> None:
        _zero(self, block_ids)

    def settle(self) -> None:
        """The processor is done when it returns."""

    def close(self) -> None:
        """The tensors must not be used any more."""
        empty = torch.empty(0)
        self.pages = self.slots = empty
        self.shared.close()


class DeviceStorage:
    """Blocks in the memory of a GPU: other processes of this host open it, and for others it is copied through host memory."""

    def __init__(self, layout: KvLayout, block_count: int, device: torch.device) -> None:
        self.layout = layout
        self.block_count = block_count
        if device.type == "cuda":
            # Who opens the blocks opens all of the allocation that they are in: it should not be one left over from loading the weights.
            torch.cuda.empty_cache()
        elements = block_count * layout.block_bytes // torch_dtype(layout).itemsize
        blocks = torch.zeros(elements, dtype=torch_dtype(layout), device=device)
        self.shared = CudaMemory(blocks, layout.block_bytes)
        self.pages, self.slots = _views(blocks, layout)
        self.settle()

    def read_from(self, source: BlockSource, block_ids: list[int], generations: list[int], into: Sequence[int]) -> bytes:
        return source.read_blocks(block_ids, generations, self.shared, into)

    def zero(self, block_ids: Sequence[int]) -> None:
        _zero(self, block_ids)
        self.settle()

    def settle(self) -> None:
        wait_for_device(self.pages.device)

    def close(self) -> None:
        """The memory is given back once no other process has it open."""
        self.pages = self.slots = torch.empty(0)
        self.shared.close()


def torch_dtype(layout: KvLayout) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[layout.dtype]


def _views(blocks: Tensor, layout: KvLayout) -> tuple[Tensor, Tensor]:
    token_width = layout.kv_head_count * layout.head_dim
    return blocks.view(-1, layout.block_size * token_width), blocks.view(-1, token_width)


def _zero(storage: KvStorage, block_ids: Sequence[int]) -> None:
    pages = storage.pages.view(storage.block_count, -1)
    pages[torch.tensor(list(block_ids), dtype=torch.int64, device=pages.device)] = 0
