"""Memory of the processor that poses as a device's: everything of the `cuda` backend runs but torch's own handles and streams.

The handle of a tensor is the name of a file in memory, which the other process maps as it would open a device's handle.
"""

from __future__ import annotations

import os
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
        storage = memory.rows.untyped_storage()
        path = storage.filename or ""  # memory of an engine of this process has no name: nobody else opens it
        return Shared(self.uuids[0], path.encode(), storage.nbytes(), 0, b"", 0, b"", False, memory.rows.storage_offset())

    def withdraw(self, shared: Shared) -> None:
        self.withdrawn_count += 1

    def open(self, shared: Shared) -> Any:
        if self.fails is not None:
            raise TransferRefused(self.fails)
        return torch.from_file(shared.handle.decode(), shared=True, size=shared.storage_bytes, dtype=torch.uint8)


def posing_backend(ipc: PosingIpc | None = None) -> CudaBackend:
    return CudaBackend(lambda _: ipc or PosingIpc())


def posing_memory(block_count: int, block_bytes: int, offset_blocks: int = 0) -> CudaMemory:
    """`offset_blocks`: of the first block in its storage."""
    byte_count = (offset_blocks + block_count) * block_bytes
    fd = os.memfd_create("posing", os.MFD_CLOEXEC)  # open for as long as the process lives: its name is how others find it
    os.ftruncate(fd, byte_count)
    tensor = torch.from_file(f"/proc/{os.getpid()}/fd/{fd}", shared=True, size=byte_count, dtype=torch.uint8)
    return CudaMemory(tensor[offset_blocks * block_bytes :], block_bytes)
