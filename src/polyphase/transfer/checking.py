"""Asking the owner of blocks whether they still are what was offered: for backends whose reader cannot see the generations itself."""

from __future__ import annotations

from polyphase.core.errors import WireError
from polyphase.transfer.backends.interface import Job, Services
from polyphase.transfer.blocks import checked_ids, pack_words, unpack_words
from polyphase.transfer.verdicts import Verdict
from polyphase.transfer.wire import Wire, expect
from polyphase.wire.transfer import Check, Verdicts


def ask_generations(wire: Wire, job: Job) -> bytes:
    """A verdict for each of the job's remote blocks: DONE if it has the generation that was offered, STALE if not.

    Raises: PeerLost, TransferTimeout, StaleDescriptor if the region is gone, WireError.
    """
    wire.send(Check(job.remote.region_id, pack_words(job.remote_ids), pack_words(job.remote_generations)))
    verdicts = expect(wire.receive(), Verdicts).verdicts
    if len(verdicts) != len(job.remote_ids):
        raise WireError(f"{len(verdicts)} verdicts came for {len(job.remote_ids)} blocks")
    return verdicts


def tell_generations(services: Services, check: Check) -> Verdicts:
    """The owner's part. Raises: StaleDescriptor, ForeignDescriptor, WireError."""
    region = services.region(check.region_id)
    ids = checked_ids(unpack_words(check.block_ids, "block ids"), region.card.block_count, f"region {check.region_id}")
    expected = unpack_words(check.generations, "generations")
    if len(expected) != len(ids):
        raise WireError(f"{len(ids)} blocks were asked about with {len(expected)} generations")
    present = region.memory.generations(ids)
    return Verdicts(bytes(Verdict.DONE if now == then else Verdict.STALE for now, then in zip(present, expected, strict=True)))


def merge(before: bytes, after: bytes) -> bytes:
    """DONE where both are."""
    return bytes(first if first != Verdict.DONE else second for first, second in zip(before, after, strict=True))
