"""Device memory of agents on one host: the reader opens the owner's allocation (CUDA IPC) and copies from device to device.

    memory = CudaMemory(torch.zeros(1 << 30, dtype=torch.uint8, device="cuda"), block_bytes=65536)
    region = Agent("decode-0", backends=[CudaBackend(), ShmBackend(), TcpBackend()]).register(memory)

Who offers blocks has synchronised the stream that wrote them. Generations lie in host memory, and the reader asks the owner about them
before and after. torch is imported when the backend starts. Ready to run, and not run yet on a GPU: see tests/cuda.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from array import array
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from polyphase.core.errors import ConfigurationError, ForeignDescriptor, PolyphaseError, TransferError, TransferRefused, WireError
from polyphase.transfer.backends.interface import Job, Judgement, Services
from polyphase.transfer.blocks import BlockMemory
from polyphase.transfer.channel import Channel
from polyphase.transfer.checking import ask_generations, merge, tell_generations
from polyphase.transfer.doors import why_not_by_unix
from polyphase.transfer.pulling import answer_pull, ask_to_pull
from polyphase.transfer.region import Region
from polyphase.transfer.shelf import Shelf
from polyphase.transfer.wire import Wire, expect, refusal_of
from polyphase.wire.transfer import AgentCard, BackendCard, Check, Facts, Greeting, Open, Pull, RegionCard

RANK = 100.0
CHUNK_BYTES = 64 << 20  # copied before the deadline is looked at again; also what the gathered blocks take of device memory
SINGLE_FROM_BYTES = 1 << 20  # blocks of this size are worth a copy of their own; smaller ones are gathered and scattered
POLL_S = 0.00005

_of_this_process: WeakValueDictionary[str, CudaMemory] = WeakValueDictionary()  # a process cannot open its own IPC handles


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
        torch = importlib.import_module("torch")
        self.rows = tensor.view(-1).view(torch.uint8).view(-1, block_bytes)
        self.block_bytes = block_bytes
        self.block_count = int(self.rows.shape[0])
        self._generations = array("Q", [1]) * self.block_count

    def generations(self, block_ids: Sequence[int]) -> list[int]:
        return [self._generations[block_id] for block_id in block_ids]

    def renew(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            self._generations[block_id] += 1

    def place(self) -> tuple[int, int]:
        """Address and device."""
        return self.rows.data_ptr(), self.rows.device.index or 0


class _Shared(msgspec.Struct, frozen=True):
    """What torch needs to open a storage of another process. Source: torch/multiprocessing/reductions.py, `reduce_tensor`."""

    pid: int
    device_uuid: str
    handle: bytes
    storage_bytes: int
    storage_offset_bytes: int
    ref_counter_handle: bytes
    ref_counter_offset: int
    event_handle: bytes
    event_sync_required: bool
    tensor_offset_bytes: int  # of the first block in the storage


class CudaBackend:
    """Implements `Backend`."""

    name = "cuda"

    def start(self, services: Services) -> BackendCard:
        self._services = services
        try:
            self.torch: Any = importlib.import_module("torch")
        except ImportError as error:
            raise TransferRefused("torch is not installed, by which device memory is shared") from error
        if not self.torch.cuda.is_available():
            raise TransferRefused("there is no CUDA device here that torch can use")
        self.uuids = [str(self.torch.cuda.get_device_properties(number).uuid) for number in range(self.torch.cuda.device_count())]
        return BackendCard(self.name, {"torch": self.torch.__version__, "devices": ",".join(self.uuids)})

    def moves(self, kind: str) -> bool:
        return kind == "cuda"

    def why_not(self, memory: BlockMemory) -> str | None:
        return None if isinstance(memory, CudaMemory) else f"{memory.kind} memory is not in a CUDA device"

    def attach(self, region: Region) -> None:
        if isinstance(region.memory, CudaMemory):
            _of_this_process[region.region_id] = region.memory

    def detach(self, region: Region) -> None:
        _of_this_process.pop(region.region_id, None)

    def judge(self, mine: AgentCard, theirs: AgentCard) -> Judgement:
        reason = why_not_by_unix(mine, theirs)
        if reason is not None:
            return Judgement(None, reason)
        here, there = mine.backend(self.name), theirs.backend(self.name)
        assert here is not None
        assert there is not None
        if here.facts.get("torch") != there.facts.get("torch"):
            return Judgement(
                None, f"torch is {here.facts.get('torch')} here and {there.facts.get('torch')} there, which may not share handles"
            )
        unseen = set(there.facts.get("devices", "").split(",")) - set(here.facts.get("devices", "").split(","))
        if unseen:
            return Judgement(None, f"devices of agent {theirs.agent_id} cannot be seen here: {', '.join(sorted(unseen))}")
        return Judgement(RANK, "both run on this host and see the same devices")

    def open_channel(self, theirs: AgentCard, session_id: bytes, deadline_ns: int) -> Channel:
        return self._services.open_socket_channel(theirs, session_id, deadline_ns)

    def connect(self, theirs: AgentCard, session_id: bytes) -> CudaLink:
        shelf = Shelf(lambda by_ns: self._services.dial(theirs, self.name, session_id, by_ns), f"agent {theirs.agent_id}")
        return CudaLink(self, shelf, self._services)

    def serve(self, wire: Wire, greeting: Greeting) -> None:
        frame = wire.receive()
        try:
            match frame:
                case Open(region_id):
                    wire.send(Facts(msgspec.msgpack.encode(self._share(region_id))))
                case Check():
                    wire.send(tell_generations(self._services, frame))
                case Pull():
                    answer_pull(wire, frame, self._services, self.name, lambda: self.connect(greeting.caller, greeting.session_id))
                case _:
                    raise WireError(f"a {type(frame).__name__} frame is no request to this backend")
        except PolyphaseError as error:
            if wire.is_closed:
                raise
            wire.send(refusal_of(error))

    def _share(self, region_id: str) -> _Shared:
        memory = self._services.region(region_id).memory
        if not isinstance(memory, CudaMemory):
            raise TransferRefused(f"region {region_id} does not lie in device memory")
        storage = memory.rows.untyped_storage()
        try:
            (_, handle, size, offset, counter, counter_offset, event, needs_sync) = storage._share_cuda_()
        except RuntimeError as error:
            raise TransferRefused(f"torch cannot share this memory with another process: {error}") from error
        return _Shared(
            pid=os.getpid(),
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

    def close(self) -> None:
        """Nothing runs."""


class CudaLink:
    """Implements `Link`. Owner: the session, or the connection of a writer; opened memory goes with it."""

    lane_count = 1

    def __init__(self, backend: CudaBackend, shelf: Shelf, services: Services) -> None:
        self._backend = backend
        self._shelf = shelf
        self._services = services
        self._opened: dict[str, Any] = {}  # rows of the peer's regions
        self._opening = threading.Lock()

    def read(self, job: Job) -> None:
        target = job.local.memory
        if not isinstance(target, CudaMemory):
            raise ForeignDescriptor(f"region {job.local.region_id} does not lie in device memory")
        with self._shelf.wire(job.deadline_ns) as wire:
            source = self._open(wire, job.remote)
            before = ask_generations(wire, job)
            copied = self._copy(job, source, target.rows)
            after = ask_generations(wire, job)
        job.verdicts[:copied] = merge(before, after)[:copied]

    def _open(self, wire: Wire, region: RegionCard) -> Any:
        with self._opening:
            rows = self._opened.get(region.region_id)
            if rows is None:
                wire.send(Open(region.region_id))
                try:
                    shared = msgspec.msgpack.decode(expect(wire.receive(), Facts).data, type=_Shared)
                except msgspec.DecodeError as error:
                    raise WireError(f"what {wire.peer} says of its memory cannot be understood: {error}") from error
                rows = self._opened[region.region_id] = self._rows(shared, region)
        return rows

    def _rows(self, shared: _Shared, region: RegionCard) -> Any:
        if shared.pid == os.getpid():
            return _of_this_process[region.region_id].rows
        torch = self._backend.torch
        if shared.device_uuid not in self._backend.uuids:
            raise TransferRefused(f"the peer's device {shared.device_uuid} cannot be seen here")
        needed = shared.tensor_offset_bytes + region.block_count * region.block_bytes
        if shared.storage_bytes < needed:
            raise WireError(f"the peer shares {shared.storage_bytes} bytes, where its region needs {needed}")
        try:
            torch.cuda._lazy_init()
            storage = torch.UntypedStorage._new_shared_cuda(
                self._backend.uuids.index(shared.device_uuid),
                shared.handle,
                shared.storage_bytes,
                shared.storage_offset_bytes,
                shared.ref_counter_handle,
                shared.ref_counter_offset,
                shared.event_handle,
                shared.event_sync_required,
            )
        except RuntimeError as error:
            raise TransferError(f"the peer's device memory cannot be opened: {error}") from error
        flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        end = shared.tensor_offset_bytes + region.block_count * region.block_bytes
        return flat[shared.tensor_offset_bytes : end].view(region.block_count, region.block_bytes)

    def _copy(self, job: Job, source: Any, target: Any) -> int:
        """Blocks that were copied; fewer than all if the job was given up or its time is over."""
        torch = self._backend.torch
        step = max(1, CHUNK_BYTES // job.remote.block_bytes)
        count = len(job.remote_ids)
        try:
            with torch.cuda.device(target.device):
                stream = torch.cuda.Stream()
                with torch.cuda.stream(stream):
                    for start in range(0, count, step):
                        if job.stop[0] or self._services.clock.now_ns() >= job.deadline_ns:
                            return start
                        part = slice(start, start + step)
                        copy_rows(torch, source, list(job.remote_ids[part]), target, list(job.local_ids[part]))
                        done = stream.record_event()
                        while not done.query():
                            time.sleep(POLL_S)
        except RuntimeError as error:
            raise TransferError(f"the device could not copy: {error}") from error
        return count

    def write(self, job: Job) -> None:
        with self._shelf.wire(job.deadline_ns) as wire:
            ask_to_pull(wire, job, self._services)

    def close(self) -> None:
        self._shelf.close()
        with self._opening:
            self._opened.clear()


def copy_rows(torch: Any, source: Any, source_ids: list[int], target: Any, target_ids: list[int]) -> None:
    """Enqueue target[target_ids] = source[source_ids] on the current stream; devices may differ."""
    if source.shape[1] >= SINGLE_FROM_BYTES:
        for target_id, source_id in zip(target_ids, source_ids, strict=True):
            target[target_id].copy_(source[source_id], non_blocking=True)
        return
    gathered = source.index_select(0, torch.tensor(source_ids, device=source.device))
    moved = gathered.to(target.device, non_blocking=True)
    target.index_copy_(0, torch.tensor(target_ids, device=target.device), moved)
