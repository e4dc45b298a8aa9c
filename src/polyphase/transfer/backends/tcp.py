"""Agents on different hosts: blocks over one TCP stream or several, each block with a checksum.

    reader ─── Read(ids, generations) ──► owner of the blocks           two such requests are on their way at a time
           ◄── Verdicts ────────────────
           ◄── the good blocks' bytes ──  a megabyte a system call, from and into registered memory
           ◄── Sums ───────────────────── XXH3-64 of each block, and which changed while they were sent

    writer ─── Write(ids, generations) ─► owner of the target
           ◄── Verdicts ────────────────  which blocks may be written
           ─── bytes, Sums ─────────────►
           ◄── Verdicts ────────────────  which arrived whole

A reader asks for as much as it can place, so a slow one makes nobody buffer. On one host the same streams run over the Unix socket, for
memory that cannot be shared. Device memory passes through a buffer at its end (transfer/staging.py). A token keeps strangers out
(greeting.py); it does not encrypt: that is the network's part.
"""

from __future__ import annotations

from array import array
from collections import deque
from itertools import islice
from operator import eq

from polyphase.core.errors import PolyphaseError, WireError
from polyphase.transfer.backends.interface import Job, Judgement, Services
from polyphase.transfer.blocks import BlockMemory, HostBlocks, StagedBlocks, checked_ids, pack_words, unpack_words
from polyphase.transfer.channel import Channel
from polyphase.transfer.doors import why_not_by_unix
from polyphase.transfer.region import Region
from polyphase.transfer.shelf import Shelf
from polyphase.transfer.staging import receive_into, send_from
from polyphase.transfer.verdicts import Verdict
from polyphase.transfer.wire import Wire, expect, refusal_of
from polyphase.wire.transfer import AgentCard, BackendCard, Greeting, Read, Sums, Verdicts, Write, request_digest

RANK = 1.0
REQUEST_BYTES = 32 << 20
REQUESTS_ON_THE_WAY = 2
STREAM_COUNT = 1


class TcpBackend:
    """Implements `Backend`."""

    name = "tcp"

    def __init__(self, stream_count: int = STREAM_COUNT) -> None:
        """`stream_count`: connections, and threads at each end, that a large transfer is spread over. More than one pays where a thread at
        either end is slower than the network; it costs CPU time."""
        self._stream_count = stream_count

    def start(self, services: Services) -> BackendCard:
        self._services = services
        return BackendCard(self.name)

    def moves(self, kind: str) -> bool:
        return kind in ("host", "cuda")

    def why_not(self, memory: BlockMemory) -> str | None:
        return None if isinstance(memory, HostBlocks | StagedBlocks) else f"{memory.kind} memory cannot be copied to the host"

    def attach(self, region: Region) -> None:
        """Nothing to do: bytes go from where they lie."""

    def detach(self, region: Region) -> None:
        """Nothing to do."""

    def judge(self, mine: AgentCard, theirs: AgentCard) -> Judgement:
        if why_not_by_unix(mine, theirs) is None:
            return Judgement(RANK, "both run on this host: over the Unix socket")
        if not theirs.tcp_address:
            return Judgement(None, f"agent {theirs.agent_id} does not listen for other hosts")
        if theirs.has_token != mine.has_token:
            lacking, having = (mine, theirs) if theirs.has_token else (theirs, mine)
            return Judgement(None, f"agent {having.agent_id} asks for a token that agent {lacking.agent_id} was not given")
        return Judgement(RANK, f"agent {theirs.agent_id} listens at {theirs.tcp_address}")

    def open_channel(self, theirs: AgentCard, session_id: bytes, deadline_ns: int) -> Channel:
        return self._services.open_socket_channel(theirs, session_id, deadline_ns)

    def connect(self, theirs: AgentCard, session_id: bytes) -> TcpLink:
        shelf = Shelf(lambda by_ns: self._services.dial(theirs, self.name, session_id, by_ns), f"agent {theirs.agent_id}")
        return TcpLink(shelf, self._services, self._stream_count)

    def serve(self, wire: Wire, greeting: Greeting) -> None:
        frame = wire.receive()
        try:
            match frame:
                case Read():
                    self._send(wire, frame)
                case Write():
                    self._receive(wire, frame)
                case _:
                    raise WireError(f"a {type(frame).__name__} frame is no request to this backend")
        except PolyphaseError as error:
            if wire.is_closed:
                raise
            wire.send(refusal_of(error))

    def _send(self, wire: Wire, request: Read) -> None:
        region, ids, expected = self._target(request)
        wire.deadline_ns = self._services.clock.now_ns() + request.time_left_ms * 1_000_000
        memory = region.sendable_blocks
        region.enter(request)
        try:
            verdicts = _compare(memory, ids, expected)
            wire.send(Verdicts(bytes(verdicts)))
            good = array("Q", [block_id for block_id, verdict in zip(ids, verdicts, strict=True) if verdict == Verdict.DONE])
            sums = send_from(wire, memory, region.card.block_bytes, good)
            wire.send(Sums(pack_words(sums), bytes(_compare(memory, ids, expected)), request_digest(request)))
        finally:
            region.leave(request)

    def _receive(self, wire: Wire, request: Write) -> None:
        region, ids, expected = self._target(request)
        wire.deadline_ns = self._services.clock.now_ns() + request.time_left_ms * 1_000_000
        memory = region.sendable_blocks
        region.enter(request)
        try:
            verdicts = _compare(memory, ids, expected)
            wire.send(Verdicts(bytes(verdicts)))
            places = [place for place, verdict in enumerate(verdicts) if verdict == Verdict.DONE]
            sums = receive_into(wire, memory, region.card.block_bytes, array("Q", [ids[place] for place in places]))
            _judge_sums(verdicts, places, sums, expect(wire.receive(), Sums), request)
            for place, verdict in enumerate(_compare(memory, ids, expected)):
                if verdict != Verdict.DONE:
                    verdicts[place] = verdict
            wire.send(Verdicts(bytes(verdicts)))
        finally:
            region.leave(request)

    def _target(self, request: Read | Write) -> tuple[Region, array[int], array[int]]:
        region = self._services.region(request.region_id)
        ids = checked_ids(unpack_words(request.block_ids, "block ids"), region.card.block_count, f"region {request.region_id}")
        expected = unpack_words(request.generations, "generations")
        if len(expected) != len(ids):
            raise WireError(f"{len(ids)} blocks were asked for with {len(expected)} generations")
        return region, ids, expected

    def close(self) -> None:
        """Nothing runs."""


class TcpLink:
    """Implements `Link`. Owner: the session."""

    def __init__(self, shelf: Shelf, services: Services, stream_count: int) -> None:
        self.lane_count = stream_count
        self._shelf = shelf
        self._services = services

    def read(self, job: Job) -> None:
        memory, width = job.local.sendable_blocks, job.remote.block_bytes
        parts = iter(_parts(len(job.remote_ids), width))
        with self._shelf.wire(job.deadline_ns) as wire:
            job.on_stop = wire.break_off
            asked = deque(self._ask(wire, job, part) for part in islice(parts, REQUESTS_ON_THE_WAY))
            while asked:
                part, request = asked.popleft()
                verdicts = bytearray(expect(wire.receive(), Verdicts).verdicts)
                _check_count(verdicts, part)
                places = [place for place, verdict in enumerate(verdicts) if verdict == Verdict.DONE]
                local_ids = array("Q", [job.local_ids[part.start + place] for place in places])
                sums = receive_into(wire, memory, width, local_ids)
                sent = expect(wire.receive(), Sums)
                for following in islice(parts, 1):
                    asked.append(self._ask(wire, job, following))
                _judge_sums(verdicts, places, sums, sent, request)
                for place, verdict in enumerate(sent.verdicts):
                    if verdict != Verdict.DONE:
                        verdicts[place] = verdict
                job.verdicts[part.start : part.stop] = verdicts
            job.on_stop = None

    def _ask(self, wire: Wire, job: Job, part: slice) -> tuple[slice, Read]:
        request = Read(
            region_id=job.remote.region_id,
            block_ids=pack_words(job.remote_ids[part]),
            generations=pack_words(job.remote_generations[part]),
            time_left_ms=self._time_left_ms(job),
        )
        wire.send(request)
        return part, request

    def write(self, job: Job) -> None:
        memory, width = job.local.sendable_blocks, job.remote.block_bytes
        with self._shelf.wire(job.deadline_ns) as wire:
            job.on_stop = wire.break_off
            for part in _parts(len(job.remote_ids), width):
                request = Write(
                    region_id=job.remote.region_id,
                    block_ids=pack_words(job.remote_ids[part]),
                    generations=pack_words(job.remote_generations[part]),
                    time_left_ms=self._time_left_ms(job),
                )
                wire.send(request)
                allowed = expect(wire.receive(), Verdicts).verdicts
                _check_count(allowed, part)
                places = [part.start + place for place, verdict in enumerate(allowed) if verdict == Verdict.DONE]
                sums = send_from(wire, memory, width, array("Q", [job.local_ids[place] for place in places]))
                wire.send(Sums(pack_words(sums), bytes(allowed), request_digest(request)))
                verdicts = expect(wire.receive(), Verdicts).verdicts
                _check_count(verdicts, part)
                job.verdicts[part.start : part.stop] = verdicts
            job.on_stop = None

    def _time_left_ms(self, job: Job) -> int:
        return max(0, (job.deadline_ns - self._services.clock.now_ns()) // 1_000_000)

    def close(self) -> None:
        self._shelf.close()


def _parts(count: int, block_bytes: int) -> list[slice]:
    step = max(1, REQUEST_BYTES // block_bytes)
    return [slice(start, min(count, start + step)) for start in range(0, count, step)]


def _compare(memory: HostBlocks | StagedBlocks, ids: array[int], expected: array[int]) -> bytearray:
    found = map(memory.generation_words.__getitem__, ids)
    return bytearray(map(eq, found, expected)).replace(b"\0", bytes([Verdict.STALE]))  # a match is 1, which is DONE


def _judge_sums(verdicts: bytearray, places: list[int], found: array[int], sent: Sums, request: Read | Write) -> None:
    if sent.request != request_digest(request):
        raise WireError("the checksums that came are those of another request")
    expected = unpack_words(sent.sums, "checksums")
    if len(expected) != len(places) or len(sent.verdicts) != len(verdicts):
        raise WireError(f"{len(expected)} checksums came for {len(places)} blocks")
    if found != expected:
        for place, sum_found, sum_sent in zip(places, found, expected, strict=True):
            if sum_found != sum_sent:
                verdicts[place] = Verdict.CORRUPT


def _check_count(verdicts: bytes | bytearray, part: slice) -> None:
    if len(verdicts) != part.stop - part.start:
        raise WireError(f"{len(verdicts)} verdicts came for {part.stop - part.start} blocks")
