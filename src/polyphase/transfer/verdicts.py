"""What became of each block of a transfer, and of the transfer as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from polyphase.core.errors import PeerLost, StaleDescriptor, TransferError, TransferTimeout


class Verdict(IntEnum):
    """Of one block. The numbers travel between agents and are those of native/block_copy.h."""

    PENDING = 0  # not looked at
    DONE = 1  # the bytes are those that were offered
    STALE = 2  # given to other content meanwhile
    CORRUPT = 3  # arrived with another checksum
    LOST = 4  # the peer died, or the connection broke
    LATE = 5  # not there by the deadline
    CANCELLED = 6  # the caller gave the transfer up
    REFUSED = 7  # the peer does not give this block, or the backend failed


_WORDS = {
    Verdict.PENDING: "not copied",
    Verdict.STALE: "given to other content",
    Verdict.CORRUPT: "damaged on the way",
    Verdict.LOST: "lost with the peer",
    Verdict.LATE: "late",
    Verdict.CANCELLED: "cancelled",
    Verdict.REFUSED: "refused",
}
_ERRORS: dict[Verdict, type[TransferError]] = {
    Verdict.STALE: StaleDescriptor,
    Verdict.LOST: PeerLost,
    Verdict.LATE: TransferTimeout,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a transfer ended. Blocks with another verdict than DONE must be computed again; the others are good."""

    verdicts: bytes  # one `Verdict` for each block, in the order of the lists
    byte_count: int  # of the good blocks
    duration_ns: int
    error: str | None  # what the backend said, if it said something

    @property
    def is_done(self) -> bool:
        """Whether every block is good."""
        return self.verdicts.count(Verdict.DONE) == len(self.verdicts)

    def failed_places(self) -> list[int]:
        """Places in the lists, not block ids."""
        return [place for place, verdict in enumerate(self.verdicts) if verdict != Verdict.DONE]

    def explain(self) -> str:
        """For a person: how many blocks met which fate."""
        counts = [(self.verdicts.count(verdict), words) for verdict, words in _WORDS.items()]
        fates = ", ".join(f"{count} {words}" for count, words in counts if count)
        summary = f"{len(self.verdicts)} blocks moved" if not fates else f"of {len(self.verdicts)} blocks {fates}"
        return f"{summary}: {self.error}" if self.error else summary

    def require(self) -> Outcome:
        """Itself if done. Raises: TransferError, of the kind of the first failed block."""
        if self.is_done:
            return self
        first = next(Verdict(verdict) for verdict in self.verdicts if verdict != Verdict.DONE)
        raise _ERRORS.get(first, TransferError)(self.explain())
