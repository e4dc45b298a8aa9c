"""How long blocks are waited for that another worker is said to have: never much longer than computing them would have taken.

    waited    | first | what has come so far, at the pace of computing |
              0    first_s                                       until_s(arrived)

While blocks come faster than they would be computed, the end moves away; when they stop coming, it is near. So a request loses half of
what computing them takes, and half a second, at most.
"""

from __future__ import annotations

from dataclasses import dataclass

from polyphase.wire.kv import KvLayout
from polyphase.wire.requests import KvHolder

SHORTEST_FIRST_S, LONGEST_FIRST_S = 0.02, 0.5
SLOWEST_BYTES_PER_S = 100e6  # while nobody knows how long computing takes


@dataclass(frozen=True, slots=True)
class Patience:
    first_s: float  # for the answer and the first blocks
    per_block_s: float  # for each that has come

    @classmethod
    def with_holder(cls, holder: KvHolder, first_block: int, layout: KvLayout) -> Patience:
        """`first_block`: of those that the reader lacks."""
        if holder.compute_ms is None:
            return cls(LONGEST_FIRST_S, layout.block_bytes / SLOWEST_BYTES_PER_S)
        believed_count = max(holder.token_count // layout.block_size - first_block, 1)
        compute_s = holder.compute_ms / 1e3
        return cls(min(max(compute_s / 2, SHORTEST_FIRST_S), LONGEST_FIRST_S), compute_s / believed_count)

    def until_s(self, arrived_count: int) -> float:
        """From the beginning, seconds."""
        return self.first_s + arrived_count * self.per_block_s
