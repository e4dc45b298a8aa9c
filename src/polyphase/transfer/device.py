"""Device memory as blocks: who copies them, on which stream, and when they are there.

    memory = CudaMemory(torch.zeros(1 << 30, dtype=torch.uint8, device="cuda"), block_bytes=65536)

Everything that this library enqueues on a device goes to one stream for each registered memory, beside the owner's own, so that the
owner's kernels need not end first; and it returns to its caller only when that stream is done. Nothing orders the two streams on the
device: whoever offers blocks has waited for the stream that wrote them (`wait_for_device`), and whoever received some may use them from
any stream.

torch is imported when the first memory is made.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from polyphase.core.errors import ConfigurationError, TransferError

SINGLE_FROM_BYTES = 1 << 20  # blocks of this size are worth a copy of their own; smaller ones are gathered and scattered


class CudaMemory:
    """A tensor in device memory as blocks. Owner: the tensor stays the caller's, and in place for as long as it is registered."""

    kind = "cuda"

    def __init__(self, tensor: Any, block_bytes: int) -> None:
        """Raises: ConfigurationError if the tensor is not contiguous or no whole number of blocks."""
        if not tensor.is_contiguous():
            raise ConfigurationError("device memory to register must be contiguous")
        byte_count = tensor.numel() * tensor.element_size()
        if block_bytes < 1 or byte_count == 0 or byte_count % block_bytes:
            raise ConfigurationError(f"{byte_count} bytes are no whole number of blocks of {block_bytes} bytes")
        self._torch = importlib.import_module("torch")
        self.rows = tensor.view(-1).view(self._torch.uint8).view(-1, block_bytes)
        self.block_bytes = block_bytes
        self.block_count = int(self.rows.shape[0])
        self.generation_words = memoryview(bytearray(8 * self.block_count)).cast("Q")
        for block_id in range(self.block_count):
            self.generation_words[block_id] = 1
        # One for good: the allocator keeps what was freed for the stream that had it, so many streams would hold on to much memory.
        self._stream = self._torch.cuda.Stream(self.rows.device) if self._is_on_device else None

    @property
    def _is_on_device(self) -> bool:
        """False: a tensor of the CPU, whose copies are done when they return. Only tests have such."""
        return bool(self.rows.device.type == "cuda")

    def generations(self, block_ids: Sequence[int]) -> list[int]:
        words = self.generation_words
        return [words[block_id] for block_id in block_ids]

    def renew(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            self.generation_words[block_id] += 1

    def place(self) -> tuple[int, int]:
        """Address and device."""
        return self.rows.data_ptr(), self.rows.device.index or 0

    def close(self) -> None:
        """Forget the tensor; no agent has it registered any more."""
        self.rows = self._torch.empty(0, 0, dtype=self._torch.uint8)

    # Copies. Each returns when it is done. Any thread. Raises: TransferError if the device fails.

    def staging(self, block_count: int) -> memoryview:
        """Host memory for so many blocks, pinned where there is a device: others pass through the driver's own buffer, at half the rate."""
        buffer = self._torch.empty(block_count * self.block_bytes, dtype=self._torch.uint8, pin_memory=self._is_on_device)
        return memoryview(buffer.numpy())

    def copy_out(self, block_ids: Sequence[int], into: memoryview) -> None:
        """Into the first blocks of a staging buffer, in order."""
        with self._finished():
            self._staged(into, len(block_ids)).copy_(self.rows.index_select(0, self._index(block_ids)), non_blocking=True)

    def copy_in(self, data: memoryview, block_ids: Sequence[int]) -> None:
        """From the first blocks of a staging buffer, in order."""
        with self._finished():
            arrived = self._staged(data, len(block_ids)).to(self.rows.device, non_blocking=True)
            self.rows.index_copy_(0, self._index(block_ids), arrived)

    def copy_from(self, source: Any, source_ids: list[int], block_ids: list[int]) -> None:
        """From rows of another tensor, in device memory too."""
        with self._finished():
            copy_rows(self._torch, source, source_ids, self.rows, block_ids)

    def _staged(self, buffer: memoryview, count: int) -> Any:
        return self._torch.frombuffer(buffer[: count * self.block_bytes], dtype=self._torch.uint8).view(count, self.block_bytes)

    def _index(self, block_ids: Sequence[int]) -> Any:
        return self._torch.tensor(list(block_ids), dtype=self._torch.int64, device=self.rows.device)

    @contextlib.contextmanager
    def _finished(self) -> Iterator[None]:
        """What is enqueued within is done at the end of the block."""
        try:
            if self._stream is None:
                yield
                return
            with self._torch.cuda.device(self.rows.device), self._torch.cuda.stream(self._stream):
                yield
                done = self._torch.cuda.Event(blocking=True)  # its wait sleeps, without the interpreter lock
                done.record(self._stream)
            done.synchronize()
        except RuntimeError as error:
            raise TransferError(f"the device could not copy: {error}") from error


def wait_for_device(device: Any) -> None:
    """Until everything is done that this thread has enqueued on its present stream of the device (a `torch.device`)."""
    if device.type == "cuda":
        importlib.import_module("torch").cuda.current_stream(device).synchronize()


def copy_rows(torch: Any, source: Any, source_ids: list[int], target: Any, target_ids: list[int]) -> None:
    """Enqueue target[target_ids] = source[source_ids] on the current stream; both in device memory, of one device or two."""
    if source.shape[1] >= SINGLE_FROM_BYTES:
        for target_id, source_id in zip(target_ids, source_ids, strict=True):
            target[target_id].copy_(source[source_id], non_blocking=True)
        return
    gathered = source.index_select(0, torch.tensor(source_ids, device=source.device))
    moved = gathered.to(target.device, non_blocking=True)
    target.index_copy_(0, torch.tensor(target_ids, device=target.device), moved)
