"""All parts that can be named in a configuration, by kind: those that come with Polyphase, and those that a composition root adds.

A part's name is unique over all kinds, so that one list serves for looking up and for what is printed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from polyphase.core.errors import ConfigurationError
from polyphase.router.contracts import Filter, MakePicker, Scorer
from polyphase.router.filters import (
    Asleep,
    Draining,
    Excluded,
    FitsContext,
    FitsRole,
    Full,
    HasAdapter,
    Mates,
    Passes,
    RequiredLabels,
    Reserve,
    Stalled,
    TakesGrammars,
)
from polyphase.router.pickers import best
from polyphase.router.scorers import Decode, Distance, InTier, Labels, Moved, Overflow, Queued, Requests, Session, Uncached
from polyphase.router.shares import Share
from polyphase.wire.events import Tier

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parts:
    """By name. `scorers` and `filters` are kept by routers as they are, so they keep no state of a deployment."""

    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    filters: Mapping[str, Filter] = field(default_factory=dict)
    pickers: Mapping[str, MakePicker] = field(default_factory=dict)

    def scorer(self, name: str) -> Scorer:
        """Raises: ConfigurationError, with the nearest names."""
        return _named("router scorer", name, self.scorers)

    def filter(self, name: str) -> Filter:
        """Raises: ConfigurationError, with the nearest names."""
        return _named("router filter", name, self.filters)

    def picker(self, name: str) -> MakePicker:
        """Raises: ConfigurationError, with the nearest names."""
        return _named("router picker", name, self.pickers)

    def with_part(self, name: str, part: Scorer | Filter | MakePicker) -> Parts:
        """One more, of whichever contract it fulfils. Raises: ConfigurationError if it fulfils none, or the name is taken."""
        if name in self.scorers or name in self.filters or name in self.pickers:
            raise ConfigurationError(f"there are two router parts named {name!r}; give one of them another name")
        match part:
            case Scorer():
                return replace(self, scorers={**self.scorers, name: part})
            case Filter():
                return replace(self, filters={**self.filters, name: part})
            case _ if callable(part):
                return replace(self, pickers={**self.pickers, name: part})
            case _:
                raise ConfigurationError(
                    f"the router part {name!r} is of the type {type(part).__name__}, which is no scorer (unit, costs), no filter "
                    "(is_lasting, keep, refusal) and no function that makes a picker; docs/router.md shows how to write one"
                )


BUILT_IN = Parts(
    scorers={
        "uncached": Uncached(),
        "host": InTier(Tier.HOST),
        "disk": InTier(Tier.DISK),
        "object": InTier(Tier.OBJECT),
        "moved": Moved(),
        "distance": Distance(),
        "queued": Queued(),
        "decode": Decode(),
        "overflow": Overflow(),
        "requests": Requests(),
        "session": Session(),
        "labels": Labels(),
        "share": Share(),
    },
    filters={
        "draining": Draining(),
        "asleep": Asleep(),
        "stalled": Stalled(),
        "excluded": Excluded(),
        "required-labels": RequiredLabels(),
        "passes": Passes(),
        "adapter": HasAdapter(),
        "grammars": TakesGrammars(),
        "role": FitsRole(),
        "context": FitsContext(),
        "full": Full(),
        "mates": Mates(),
        "reserve": Reserve(),
    },
    pickers={"best": best},
)


def unknown_name(kind: str, name: str, known: Mapping[str, object]) -> ConfigurationError:
    """`there is no router scorer 'queue'; did you mean queued?`, or all that there are where none is near."""
    near = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(known)}"
    return ConfigurationError(f"there is no {kind} {name!r}; {hint}")


def _named(kind: str, name: str, known: Mapping[str, T]) -> T:
    found = known.get(name)
    if found is None:
        raise unknown_name(kind, name, known)
    return found
