"""NIXL (UCX): RDMA between hosts, and device memory, where that library is installed and the hardware is there. An extra, off by default.

    agent = Agent("decode-0", backends=[ShmBackend(), NixlBackend(), TcpBackend()], tcp_address="10.0.0.5:0")

What this backend does about the library's weak spots:

    its progress thread spins      it is off; the side that is read from makes progress while a peer says that it reads
    its notifications take 16 ms   ours are used
    deserialize_descs unpickles    it is never called: addresses travel in our own frames, its metadata as the bytes it made
    a second registration passes   ours is refused before
    a read blocks its poster       it runs on a thread of the agent's
    nothing checks what arrived    generations are compared with the owner before and after

Source: NIXL 1.5.1, nixl_cu12/_api.py.
"""

from __future__ import annotations

import ctypes
import importlib
import select
import threading
import time
from typing import Any

import msgspec

from polyphase.core.errors import PolyphaseError, TransferError, TransferRefused, TransferTimeout, WireError
from polyphase.transfer.backends.interface import Job, Judgement, Services
from polyphase.transfer.blocks import BlockMemory, HostBlocks
from polyphase.transfer.channel import Channel
from polyphase.transfer.checking import ask_generations, merge, tell_generations
from polyphase.transfer.doors import why_not_by_unix
from polyphase.transfer.pulling import answer_pull, ask_to_pull
from polyphase.transfer.region import Region
from polyphase.transfer.shelf import Shelf
from polyphase.transfer.wire import Wire, expect, refusal_of
from polyphase.wire.transfer import AgentCard, BackendCard, Check, Facts, Greeting, Open, Pull, RegionCard

RANK_LOCAL = 5.0  # below `shm`, which needs no system call for a block
RANK_REMOTE = 8.0  # above `tcp`
POLL_S = 0.0002
ABORT_TIMEOUT_S = 5.0
SEGMENTS = {"host": "DRAM", "cuda": "VRAM"}


class _Registered(msgspec.Struct, frozen=True):
    """What a reader has to know of a region: the library's own metadata, and where the blocks lie in the owner's memory."""

    metadata: bytes
    address: int
    device: int


class NixlBackend:
    """Implements `Backend`."""

    name = "nixl"

    def __init__(self) -> None:
        self._registered: dict[str, tuple[Any, int, int]] = {}  # by region: handle, address, device
        self._lists: dict[str, Any] = {}  # prepared lists of our own regions
        self.calling = threading.RLock()  # the library is told to be used by one thread at a time
        self._links: dict[str, NixlLink] = {}  # to writers, whose blocks we pull

    def start(self, services: Services) -> BackendCard:
        self._services = services
        try:
            api = importlib.import_module("nixl._api")
        except ImportError as error:
            raise TransferRefused(
                f"the package nixl is not installed or cannot be loaded ({error}); pip install 'polyphase[nixl]'"
            ) from error
        card = services.card
        try:
            self.library = api.nixl_agent(
                f"{card.agent_id}#{card.epoch}", api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
            )
        except Exception as error:
            raise TransferRefused(f"NIXL cannot be started here: {error}") from error
        if "UCX" not in self.library.backends:
            raise TransferRefused("this build of NIXL has no UCX plugin")
        return BackendCard(self.name, {"transport": "UCX"})

    def moves(self, kind: str) -> bool:
        return kind in SEGMENTS

    def why_not(self, memory: BlockMemory) -> str | None:
        return None if memory.kind in SEGMENTS else f"{memory.kind} memory has no segment type in NIXL"

    def attach(self, region: Region) -> None:
        address, device = place_of(region.memory)
        size = region.memory.block_count * region.memory.block_bytes
        with self.calling:
            handle = self.library.register_memory([(address, size, device, region.region_id)], SEGMENTS[region.memory.kind])
            self._registered[region.region_id] = handle, address, device

    def detach(self, region: Region) -> None:
        with self.calling:
            prepared = self._lists.pop(region.region_id, None)
            if prepared is not None:
                prepared.release()
            self.library.deregister_memory(self._registered.pop(region.region_id)[0])

    def judge(self, mine: AgentCard, theirs: AgentCard) -> Judgement:
        if why_not_by_unix(mine, theirs) is None:
            return Judgement(RANK_LOCAL, "both have NIXL, and run on this host")
        if not theirs.tcp_address:
            return Judgement(None, f"agent {theirs.agent_id} does not listen for other hosts, where NIXL's metadata is exchanged")
        return Judgement(RANK_REMOTE, "both have NIXL")

    def open_channel(self, theirs: AgentCard, session_id: bytes, deadline_ns: int) -> Channel:
        return self._services.open_socket_channel(theirs, session_id, deadline_ns)

    def connect(self, theirs: AgentCard, session_id: bytes) -> NixlLink:
        shelf = Shelf(lambda by_ns: self._services.dial(theirs, self.name, session_id, by_ns), f"agent {theirs.agent_id}")
        return NixlLink(self, shelf, self._services, theirs)

    def local_list(self, region: Region) -> Any:
        """The prepared list of all blocks of a region of ours; the caller holds `calling`."""
        prepared = self._lists.get(region.region_id)
        if prepared is None:
            _, address, device = self._registered[region.region_id]
            blocks = _descriptors(region.card, address, device)
            prepared = self._lists[region.region_id] = self.library.prep_xfer_dlist("NIXL_INIT_AGENT", blocks, SEGMENTS[region.card.kind])
        return prepared

    def serve(self, wire: Wire, greeting: Greeting) -> None:
        frame = wire.receive()
        try:
            match frame:
                case Open(region_id):
                    wire.send(Facts(msgspec.msgpack.encode(self._facts(region_id))))
                case Check():
                    self._be_read(wire, frame)
                case Pull():
                    answer_pull(wire, frame, self._services, self.name, lambda: self.connect(greeting.caller, greeting.session_id))
                case _:
                    raise WireError(f"a {type(frame).__name__} frame is no request to this backend")
        except PolyphaseError as error:
            if wire.is_closed:
                raise
            wire.send(refusal_of(error))

    def _facts(self, region_id: str) -> _Registered:
        self._services.region(region_id)
        with self.calling:
            _, address, device = self._registered[region_id]
            return _Registered(self.library.get_agent_metadata(), address, device)

    def _be_read(self, wire: Wire, check: Check) -> None:
        """Between a reader's two checks: help its transfer along, and keep the region in place."""
        region = self._services.region(check.region_id)
        region.enter(check)
        try:
            wire.send(tell_generations(self._services, check))
            while not select.select([wire.socket], [], [], POLL_S)[0]:
                if self._services.clock.now_ns() > wire.deadline_ns:
                    raise TransferTimeout("the reader never said that it is done")
                with self.calling:
                    self.library.get_new_notifs()
        finally:
            region.leave(check)
        wire.send(tell_generations(self._services, expect(wire.receive(), Check)))

    def close(self) -> None:
        with self.calling:
            for prepared in self._lists.values():
                prepared.release()
            self._lists.clear()
            if hasattr(self, "library"):
                del self.library


class NixlLink:
    """Implements `Link`. Owner: the session, or the connection of a writer."""

    lane_count = 1  # the library is used by one thread at a time

    def __init__(self, backend: NixlBackend, shelf: Shelf, services: Services, theirs: AgentCard) -> None:
        self._backend = backend
        self._shelf = shelf
        self._services = services
        self._theirs = theirs
        self._lists: dict[str, Any] = {}  # prepared lists of the peer's regions
        self._peer_name = ""

    def read(self, job: Job) -> None:
        with self._shelf.wire(job.deadline_ns) as wire:
            self._open(wire, job.remote)
            before = ask_generations(wire, job)
            self._transfer(job)
            after = ask_generations(wire, job)
        job.verdicts[:] = merge(before, after)

    def _open(self, wire: Wire, region: RegionCard) -> None:
        if region.region_id in self._lists:
            return
        wire.send(Open(region.region_id))
        try:
            told = msgspec.msgpack.decode(expect(wire.receive(), Facts).data, type=_Registered)
        except msgspec.DecodeError as error:
            raise WireError(f"what {wire.peer} says of its registration cannot be understood: {error}") from error
        backend = self._backend
        with backend.calling:
            try:
                name = backend.library.add_remote_agent(told.metadata)
                self._peer_name = name.decode() if isinstance(name, bytes) else name
                blocks = _descriptors(region, told.address, told.device)
                self._lists[region.region_id] = backend.library.prep_xfer_dlist(self._peer_name, blocks, SEGMENTS[region.kind])
            except Exception as error:
                raise TransferError(f"NIXL does not accept the metadata of agent {self._theirs.agent_id}: {error}") from error

    def _transfer(self, job: Job) -> None:
        """Raises: TransferTimeout, TransferError; either way the library has let go of the memory."""
        backend = self._backend
        with backend.calling:
            try:
                handle = backend.library.make_prepped_xfer(
                    "READ", backend.local_list(job.local), list(job.local_ids), self._lists[job.remote.region_id], list(job.remote_ids)
                )
                state = backend.library.transfer(handle)
            except Exception as error:
                raise TransferError(f"NIXL cannot read from agent {self._theirs.agent_id}: {error}") from error
        try:
            while state == "PROC" and not job.stop[0] and self._services.clock.now_ns() < job.deadline_ns:
                time.sleep(POLL_S)
                state = self._state(handle)
        finally:
            self._let_go(handle, is_running=state == "PROC")
        if state == "PROC":
            raise TransferTimeout("NIXL had not read all blocks in time")
        if state != "DONE":
            raise TransferError(f"NIXL's read from agent {self._theirs.agent_id} ended as {state}")

    def _state(self, handle: Any) -> str:
        with self._backend.calling:
            try:
                return str(self._backend.library.check_xfer_state(handle))
            except Exception as error:
                raise TransferError(f"NIXL's read from agent {self._theirs.agent_id} failed: {error}") from error

    def _let_go(self, handle: Any, *, is_running: bool) -> None:
        """Abort what still runs; where the transport cannot, wait for it, since the memory may be written until then."""
        end_s = time.monotonic() + ABORT_TIMEOUT_S
        while True:
            with self._backend.calling:
                try:
                    handle.release()
                    return
                except Exception:  # noqa: BLE001  the library's way to say that it is not done yet
                    if not is_running or time.monotonic() > end_s:
                        return
            time.sleep(POLL_S)

    def write(self, job: Job) -> None:
        with self._shelf.wire(job.deadline_ns) as wire:
            ask_to_pull(wire, job, self._services)

    def close(self) -> None:
        self._shelf.close()
        with self._backend.calling:
            for prepared in self._lists.values():
                prepared.release()
            self._lists.clear()
            if self._peer_name and hasattr(self._backend, "library"):
                try:
                    self._backend.library.remove_remote_agent(self._peer_name)
                except Exception:  # noqa: BLE001  another session may have removed it
                    pass
                self._peer_name = ""


def place_of(memory: BlockMemory) -> tuple[int, int]:
    """Address and device of the first block. The memory stays where it is for as long as it is registered."""
    if isinstance(memory, HostBlocks):
        return ctypes.addressof(ctypes.c_char.from_buffer(memory.blocks)), 0
    address, device = memory.place()  # type: ignore[attr-defined]
    return int(address), int(device)


def _descriptors(region: RegionCard, address: int, device: int) -> list[tuple[int, int, int]]:
    return [(address + number * region.block_bytes, region.block_bytes, device) for number in range(region.block_count)]
