"""Which backend two agents use: the best that both have, and for every other the reason why not. Values in, a decision out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from polyphase.core.errors import TransferRefused
from polyphase.wire.transfer import AgentCard, RegionCard


class Judge(Protocol):
    """A backend, as far as the choice is concerned."""

    @property
    def name(self) -> str: ...

    def judge(self, mine: AgentCard, theirs: AgentCard) -> Candidate: ...


class Candidate(Protocol):
    @property
    def rank(self) -> float | None: ...

    @property
    def reason(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Option:
    """One backend and what speaks for or against it."""

    backend: str
    rank: float | None  # None: not possible
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """Options in order of preference; those that are not possible come last."""

    options: tuple[Option, ...]

    @property
    def possible(self) -> list[str]:
        return [option.backend for option in self.options if option.rank is not None]

    def explain(self) -> str:
        """One line for each backend."""
        chosen = next(iter(self.possible), None)
        marks = {True: "chosen", False: "possible"}
        return "\n".join(
            f"{option.backend}: {'not possible' if option.rank is None else marks[option.backend == chosen]}: {option.reason}"
            for option in self.options
        )

    def without(self, backend: str, reason: str) -> Choice:
        """After it was tried, and cannot be used although both have it."""
        left = [option for option in self.options if option.backend != backend]
        return Choice((*left, Option(backend, None, reason)))

    def require(self, peer: str) -> None:
        """Raises: TransferRefused with all reasons if there is no way at all."""
        if not self.possible:
            reasons = "; ".join(f"{option.backend}: {option.reason}" for option in self.options)
            raise TransferRefused(f"there is no backend that this agent and agent {peer} can both use ({reasons or 'this one has none'})")


def choose(mine: AgentCard, theirs: AgentCard, judges: Sequence[Judge], unavailable: dict[str, str]) -> Choice:
    """Judge every backend that either side has.

    Args:
        unavailable: backends that could not be started here, by name, with the reason.
    """
    options = []
    for judge in judges:
        if theirs.backend(judge.name) is None:
            options.append(Option(judge.name, None, f"agent {theirs.agent_id} does not have it"))
        else:
            found = judge.judge(mine, theirs)
            options.append(Option(judge.name, found.rank, found.reason))
    known = {option.backend for option in options}
    for name in [*unavailable, *(backend.name for backend in theirs.backends)]:
        if name not in known:
            options.append(Option(name, None, unavailable.get(name, "this agent was made without it")))
            known.add(name)
    return Choice(tuple(sorted(options, key=lambda option: -1.0 if option.rank is None else option.rank, reverse=True)))


def choose_for_regions(choice: Choice, local_backends: Sequence[str], remote: RegionCard) -> str:
    """The best backend that reaches both memories. Raises: TransferRefused with the reason if none does."""
    for name in choice.possible:
        if name in local_backends and name in remote.backends:
            return name
    raise TransferRefused(
        f"no backend moves blocks between this memory (reached by {', '.join(local_backends) or 'none'}) and the peer's {remote.kind} "
        f"memory (reached by {', '.join(remote.backends) or 'none'}); possible between the agents: {', '.join(choice.possible)}"
    )
