"""Device memory handed to another process by torch: what has to be told, and the opening of it.

A handle of CUDA's is of a whole allocation, in which torch's allocator may have placed other tensors too. So two offsets are told: of the
tensor's storage in the allocation, and of the first block in the storage. Each sharing is for one opening: torch counts them in a small
file that both map, and keeps memory that its owner frees for as long as somebody has it open. Nothing keeps it when the owner's process
ends, which is why what was copied counts only if the owner still answers afterwards.

Source: torch/multiprocessing/reductions.py, `reduce_tensor` and `rebuild_cuda_tensor`; torch/csrc/StorageSharing.cpp.
"""

from __future__ import annotations

from typing import Any

import msgspec

from polyphase.core.errors import TransferRefused, WireError
from polyphase.transfer.device import CudaMemory
from polyphase.wire.transfer import RegionCard


class Shared(msgspec.Struct, frozen=True):
    """What torch needs to open a storage of another process."""

    device_uuid: str
    handle: bytes
    storage_bytes: int
    storage_offset_bytes: int  # in the allocation that the handle is of
    ref_counter_handle: bytes
    ref_counter_offset: int
    event_handle: bytes
    event_sync_required: bool
    tensor_offset_bytes: int  # of the first block in the storage


class TorchIpc:
    """The only place that asks torch for handles; tests without a device put another in its place."""

    def __init__(self, torch: Any) -> None:
        """Raises: TransferRefused if there is no device."""
        if not torch.cuda.is_available():
            raise TransferRefused("there is no CUDA device here that torch can use")
        self._torch = torch
        self.uuids = [str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]

    def share(self, memory: CudaMemory) -> Shared:
        """For one opening. Raises: TransferRefused with torch's reason."""
        try:
            (_, handle, size, offset, counter, counter_offset, event, needs_sync) = memory.rows.untyped_storage()._share_cuda_()
        except RuntimeError as error:
            raise TransferRefused(f"torch cannot share this memory with another process: {error}") from error
        return Shared(
            device_uuid=self.uuids[memory.rows.device.index],
            handle=bytes(handle),
            storage_bytes=size,
            storage_offset_bytes=offset,
            ref_counter_handle=bytes(counter),
            ref_counter_offset=counter_offset,
            event_handle=bytes(event),
            event_sync_required=bool(needs_sync),
            tensor_offset_bytes=memory.rows.storage_offset(),  # of bytes: its items are bytes
        )

    def withdraw(self, shared: Shared) -> None:
        """It will not be opened."""
        self._torch.UntypedStorage._release_ipc_counter_cuda(shared.ref_counter_handle, shared.ref_counter_offset)

    def open(self, shared: Shared) -> Any:
        """The whole storage, as bytes, open for as long as the tensor lives. Raises: TransferRefused if it cannot be opened here."""
        torch = self._torch
        if shared.device_uuid not in self.uuids:
            raise TransferRefused(f"the peer's device {shared.device_uuid} cannot be seen here")
        try:
            torch.cuda._lazy_init()
            storage = torch.UntypedStorage._new_shared_cuda(
                self.uuids.index(shared.device_uuid),
                shared.handle,
                shared.storage_bytes,
                shared.storage_offset_bytes,
                shared.ref_counter_handle,
                shared.ref_counter_offset,
                shared.event_handle,
                shared.event_sync_required,
            )
        except RuntimeError as error:
            raise TransferRefused(f"the peer's device memory cannot be opened: {error}") from error
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def rows_of(ipc: TorchIpc, shared: Shared, region: RegionCard) -> Any:
    """The blocks of a peer's region: uint8[block_count, block_bytes].

    Raises: WireError if what is shared is smaller than the region; TransferRefused.
    """
    end = shared.tensor_offset_bytes + region.block_count * region.block_bytes
    if shared.tensor_offset_bytes < 0 or shared.storage_bytes < end:
        raise WireError(f"the peer shares {shared.storage_bytes} bytes, where its region needs {end}")
    return ipc.open(shared)[shared.tensor_offset_bytes : end].view(region.block_count, region.block_bytes)
