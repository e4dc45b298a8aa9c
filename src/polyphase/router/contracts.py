"""The contracts of the parts that a policy is put together from. A part is one small class in one file, ours or somebody else's.

    workers of the model ─► filters ─► rows that may take the leg
                            scorers ─► a cost for each row, in tokens of prefill once it is multiplied by the part's weight
                            picker  ─► one row

Parts are told everything and keep nothing: no clock, no randomness of their own, so that the same calls give the same routes, live or
in the twin. A row's number means the same worker in all columns of one `Lineup`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from polyphase.core.errors import Refused
from polyphase.router.lineup import Lineup
from polyphase.router.types import Leg, RouteRequest


@runtime_checkable
class Scorer(Protocol):
    """One reason to avoid a worker, as a cost that is not negative. The part's unit is what one unit of cost stands for."""

    @property
    def unit(self) -> str:
        """In a few words, for the table of parts: `tokens to compute`."""

    def costs(self, request: RouteRequest, leg: Leg, workers: Lineup) -> Sequence[float] | None:
        """A cost for every row, also for those that a filter took out; None if all cost the same, which spares the arithmetic."""


@runtime_checkable
class Filter(Protocol):
    """One reason why a worker may not take a leg at all."""

    @property
    def is_lasting(self) -> bool:
        """True: it looks at nothing but the workers' facts, and at what makes a request other than `RouteRequest.is_ordinary`.

        For ordinary requests the router remembers what it answered until facts change. Lasting filters come before the others.
        """

    def keep(self, request: RouteRequest, leg: Leg, workers: Lineup, rows: Sequence[int]) -> Sequence[int]:
        """Those of `rows`, in their order, that may take the leg; `rows` itself if all may."""

    def refusal(self, request: RouteRequest, worker_count: int) -> Refused:
        """What the client is told when this filter has left none of `worker_count` workers."""


@runtime_checkable
class Picker(Protocol):
    """Chooses one of the rows that are left (`workers.rows`; None: all)."""

    def pick(self, scores: Sequence[float], workers: Lineup, turn: int) -> int:
        """`scores` has an entry for each row, 0 where a filter took it out. `turn` counts decisions: the source of anything like chance."""


class MakePicker(Protocol):
    """How a picker is listed among the parts: as what makes one for a temperature. Raises: ConfigurationError if it cannot use that."""

    def __call__(self, temperature: float) -> Picker: ...
