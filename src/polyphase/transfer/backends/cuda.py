"""Device memory of agents on one host: the reader opens the owner's allocation (CUDA IPC) and copies from device to device.

    memory = CudaMemory(torch.zeros(1 << 30, dtype=torch.uint8, device="cuda"), block_bytes=65536)
    region = Agent("decode-0", backends=[CudaBackend(), ShmBackend(), TcpBackend()]).register(memory)

    reader ─── Open(region) ──► owner       once a session: `Shared`, a handle for this reader
           ─── Check ─────────► owner       generations lie in host memory, with the owner
           ═══ copies on its own stream, and waits for it
           ─── Check ─────────► owner       still the same blocks, and the owner still lives

Who offers blocks has waited for the stream that wrote them (transfer/device.py). Where memory cannot be shared or opened, the agents go on
with the next backend. Not run yet on a GPU: see tests/cuda.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from polyphase.core.errors import BackendUnusable, ForeignDescriptor, PolyphaseError, TransferRefused, WireError
from polyphase.transfer.backends.cuda_ipc import Shared, TorchIpc, rows_of
from polyphase.transfer.backends.interface import Job, Judgement, Services
from polyphase.transfer.blocks import BlockMemory
from polyphase.transfer.channel import Channel
from polyphase.transfer.checking import ask_generations, merge, tell_generations
from polyphase.transfer.device import CudaMemory
from polyphase.transfer.doors import why_not_by_unix
from polyphase.transfer.pulling import answer_pull, ask_to_pull
from polyphase.transfer.region import Region
from polyphase.transfer.shelf import Shelf
from polyphase.transfer.wire import Wire, expect, refusal_of
from polyphase.wire.transfer import AgentCard, BackendCard, Check, Facts, Greeting, Open, Pull, RegionCard

RANK = 100.0
CHUNK_BYTES = 32 << 20  # copied before the deadline is looked at again; also what the gathered blocks take of device memory

_of_this_process: WeakValueDictionary[str, CudaMemory] = WeakValueDictionary()  # a process cannot open its own IPC handles


class CudaBackend:
    """Implements `Backend`."""

    name = "cuda"

    def __init__(self, make_ipc: Callable[[Any], TorchIpc] = TorchIpc) -> None:
        self._make_ipc = make_ipc

    def start(self, services: Services) -> BackendCard:
        self._services = services
        try:
            torch: Any = importlib.import_module("torch")
        except ImportError as error:
            raise TransferRefused("torch is not installed, by which device memory is shared") from error
        self.ipc = self._make_ipc(torch)
        return BackendCard(self.name, {"torch": str(torch.__version__), "devices": ",".join(self.ipc.uuids)})

    def moves(self, kind: str) -> bool:
        return kind == "cuda"

    def why_not(self, memory: BlockMemory) -> str | None:
        if not isinstance(memory, CudaMemory):
            return f"{memory.kind} memory is not in a CUDA device"
        try:
            # Not every allocator and system has handles; that had better be known before the first read.
            self.ipc.withdraw(self.ipc.share(memory))
        except TransferRefused as refused:
            return refused.message
        return None

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

    def _share(self, region_id: str) -> Shared:
        memory = self._services.region(region_id).memory
        if not isinstance(memory, CudaMemory):
            raise TransferRefused(f"region {region_id} does not lie in device memory")
        return self.ipc.share(memory)

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
            copied = self._copy(job, source, target)
            after = ask_generations(wire, job)
        job.verdicts[:copied] = merge(before, after)[:copied]

    def _open(self, wire: Wire, region: RegionCard) -> Any:
        """Raises: BackendUnusable if the owner cannot share its memory, or it cannot be opened here."""
        with self._opening:
            rows = self._opened.get(region.region_id)
            if rows is None:
                own = _of_this_process.get(region.region_id)
                try:
                    rows = own.rows if own is not None else rows_of(self._backend.ipc, self._ask(wire, region), region)
                except TransferRefused as refused:
                    raise BackendUnusable(refused.message) from refused
                self._opened[region.region_id] = rows
        return rows

    def _ask(self, wire: Wire, region: RegionCard) -> Shared:
        wire.send(Open(region.region_id))
        try:
            return msgspec.msgpack.decode(expect(wire.receive(), Facts).data, type=Shared)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise WireError(f"what {wire.peer} says of its memory cannot be understood: {error}") from error

    def _copy(self, job: Job, source: Any, target: CudaMemory) -> int:
        """Blocks that were copied; fewer than all if the job was given up or its time is over."""
        step = max(1, CHUNK_BYTES // job.remote.block_bytes)
        count = len(job.remote_ids)
        for start in range(0, count, step):
            if job.stop[0] or self._services.clock.now_ns() >= job.deadline_ns:
                return start
            part = slice(start, start + step)
            target.copy_from(source, list(job.remote_ids[part]), list(job.local_ids[part]))
        return count

    def write(self, job: Job) -> None:
        with self._shelf.wire(job.deadline_ns) as wire:
            ask_to_pull(wire, job, self._services)

    def close(self) -> None:
        self._shelf.close()
        with self._opening:
            self._opened.clear()
