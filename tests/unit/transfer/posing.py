"""Memory of the processor that poses as a device's: everything of the `cuda` backend runs but torch's own handles and streams.

The handle of a tensor is the name of a file in shared memory, which torch maps in the other process, as it would open a device's handle.
"""

from __future__ import annotations

from typing import Any

import torch

from polyphase.core.errors import TransferRefused
from polyphase.transfer.backends.cuda import CudaBackend
from polyphase.transfer.backends.cuda_ipc import Shared, TorchIpc
from polyphase.transfer.device import CudaMemory


class PosingIpc(TorchIpc):
    """`refuses` is what sharing, `fails` what opening ends with."""

    def __init__(self, refuses: str | None = None, fails: str | None = None) -> None:
        self.uuids = ["GPU-posing"]
        self.refuses, self.fails = refuses, fails
        self.shared_count = self.withdrawn_count = 0

    def share(self, memory: CudaMemory) -> Shared:
        if self.refuses is not None:
            raise TransferRefused(self.refuses)
        self.shared_count += 1
        manager, handle, size = memory.rows.untyped_storage()._share_filename_cpu_()
        return Shared(self.uuids[0], bytes(handle), size, 0, bytes(manager), 0, b"", False, memory.rows.storage_offset())

    def withdraw(self, shared: Shared) -> None:
        self.withdrawn_count += 1

    def open(self, shared: Shared) -> Any:
        if self.fails is not None:
            raise TransferRefused(self.fails)
        storage = torch.UntypedStorage._new_shared_filename_cpu(shared.ref_counter_handle, shared.handle, shared.storage_bytes)
        return torch.empty(0, dtype=torch.uint8).set_(storage)


def posing_backend(ipc: PosingIpc | None = None) -> CudaBackend:
    return CudaBackend(lambda _: ipc or PosingIpc())


def posing_memory(block_count: int, block_bytes: int, offset_blocks: int = 0) -> CudaMemory:
    """`offset_blocks`: of the first block in its storage."""
    tensor = torch.zeros((offset_blocks + block_count) * block_bytes, dtype=torch.uint8)
    return CudaMemory(tensor[offset_blocks * block_bytes :], block_bytes)
