"""Writes, for backends in which only the reader copies: the writer asks the owner of the target to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from polyphase.core.errors import WireError
from polyphase.transfer.backends.interface import Job, Link, Services
from polyphase.transfer.blocks import checked_ids, pack_words, unpack_words, words_of
from polyphase.transfer.region import Region
from polyphase.transfer.verdicts import Verdict
from polyphase.transfer.wire import Wire, expect
from polyphase.wire.transfer import Pull, Verdicts


def ask_to_pull(wire: Wire, job: Job, services: Services, fds: tuple[int, ...] = ()) -> None:
    """The writer's part: fills the job's verdicts. Raises: PeerLost, TransferTimeout, WireError, and what the owner refuses."""
    generations = words_of(job.local.memory.generations(list(job.local_ids)), "generations")
    pull = Pull(
        source=job.local.card,
        source_block_ids=pack_words(job.local_ids),
        source_generations=pack_words(generations),
        region_id=job.remote.region_id,
        block_ids=pack_words(job.remote_ids),
        generations=pack_words(job.remote_generations),
        time_left_ms=max(0, (job.deadline_ns - services.clock.now_ns()) // 1_000_000),
    )
    job.on_stop = wire.break_off
    wire.send(pull, fds)
    verdicts = expect(wire.receive(), Verdicts).verdicts
    job.on_stop = None
    if len(verdicts) != len(job.remote_ids):
        raise WireError(f"{len(verdicts)} verdicts came for {len(job.remote_ids)} blocks")
    job.verdicts[:] = verdicts


def answer_pull(wire: Wire, pull: Pull, services: Services, name: str, connect: Callable[[], Link]) -> None:
    """The owner's part, for backends that read through a link to the writer: one for each of its connections, closed with it.

    `name`: the backend's, under which the connection keeps the link. Raises: as `Link.read` and `PullJob`.
    """
    link = cast("Link | None", wire.kept.get(name))
    if link is None:
        link = wire.kept[name] = connect()
    pulled = PullJob(services, pull)
    if len(pulled.job.remote_ids):
        pulled.region.enter(pulled.job)
        try:
            link.read(pulled.job)
        finally:
            pulled.region.leave(pulled.job)
    wire.send(pulled.verdicts())


class PullJob:
    """The owner's part: what a writer asked for, as a read of the owner's own. Blocks that are no longer the writer's are left out."""

    def __init__(self, services: Services, pull: Pull) -> None:
        """Raises: StaleDescriptor, ForeignDescriptor, WireError if the lists do not fit."""
        self.region: Region = services.region(pull.region_id)
        self._ids = checked_ids(unpack_words(pull.block_ids, "block ids"), self.region.card.block_count, f"region {pull.region_id}")
        self._granted = unpack_words(pull.generations, "generations")
        sources = checked_ids(unpack_words(pull.source_block_ids, "block ids"), pull.source.block_count, f"region {pull.source.region_id}")
        expected = unpack_words(pull.source_generations, "generations")
        if not len(self._ids) == len(self._granted) == len(sources) == len(expected):
            raise WireError("a write names lists of different lengths")
        if self.region.card.block_bytes != pull.source.block_bytes:
            raise WireError(f"blocks of {pull.source.block_bytes} bytes cannot be written into blocks of {self.region.card.block_bytes}")
        self._places = [place for place in range(len(self._ids)) if self._is_granted(place)]
        self._copied = bytearray(len(self._places))
        self.job = Job(
            remote=pull.source,
            remote_ids=words_of([sources[place] for place in self._places], "block ids"),
            remote_generations=words_of([expected[place] for place in self._places], "generations"),
            local=self.region,
            local_ids=words_of([self._ids[place] for place in self._places], "block ids"),
            verdicts=memoryview(self._copied),
            deadline_ns=services.clock.now_ns() + pull.time_left_ms * 1_000_000,
            stop=bytearray(1),
        )

    def _is_granted(self, place: int) -> bool:
        return self.region.memory.generations([self._ids[place]])[0] == self._granted[place]

    def verdicts(self) -> Verdicts:
        """After the job was performed; blocks that it did not come to are late."""
        found = bytearray([Verdict.STALE]) * len(self._ids)
        for place, verdict in zip(self._places, self._copied, strict=True):
            if self._is_granted(place):
                found[place] = Verdict.LATE if verdict == Verdict.PENDING else verdict
        return Verdicts(bytes(found))
