"""A router policy as people write it, and the parts that it names: ours, and those of installed packages.

    weights = { uncached = 2, requests = 50 }     a table in the file
    --router-weights uncached=2,requests=50       a text in flags and variables

Another package offers a part by an entry point of the group `polyphase.router.parts`: its name is the part's, its object a class or an
instance of one (for a picker, a function of the temperature). Only what a policy names is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from polyphase.core.errors import ConfigurationError
from polyphase.router import BUILT_IN, Parts, PolicySettings
from polyphase.router.contracts import Filter, MakePicker, Scorer
from polyphase.router.parts import unknown_name

GROUP = "polyphase.router.parts"


def parse_weights(given: object) -> dict[str, float]:
    """Weights by part, from a table or a text. Raises: ValueError, with an example."""
    if isinstance(given, Mapping):
        pairs = [(str(name), weight) for name, weight in given.items()]
    elif isinstance(given, str):
        pairs = parse_pairs(given, "weights", "uncached=2,requests=50")
    else:
        raise ValueError(f"{given!r} are no weights; write for example uncached=2,requests=50")
    return {name: _number(name, weight) for name, weight in pairs}


def parse_pairs(text: str, kind: str, example: str) -> list[tuple[str, str]]:
    """`a=1,b=2`. Raises: ValueError, with the example, also if a name comes twice."""
    pairs: dict[str, str] = {}
    for pair in text.split(","):
        name, _, value = (part.strip() for part in pair.partition("="))
        if not name and not value:
            continue
        if not name or not value:
            raise ValueError(f"{text!r} are no {kind}; write for example {example}")
        if name in pairs:
            raise ValueError(f"{text!r} names {name!r} twice")
        pairs[name] = value
    return list(pairs.items())


def parse_names(given: object) -> tuple[str, ...]:
    """Names in a list, or in a text with commas. Raises: ValueError, with an example."""
    if isinstance(given, str):
        given = [name.strip() for name in given.split(",") if name.strip()]
    if isinstance(given, list | tuple) and all(isinstance(name, str) for name in given):
        return tuple(given)
    raise ValueError(f"{given!r} are no names; write for example my-filter,my-other-filter")


def weights_text(weights: Mapping[str, float]) -> str:
    """What `parse_weights` reads."""
    return ",".join(f"{name}={weight:.12g}" for name, weight in weights.items())


def parts_of(policy: PolicySettings) -> Parts:
    """Our parts, and those of other packages that this policy names.

    Raises: ConfigurationError if a name belongs to nobody, or to two packages, or if what it names is broken.
    """
    parts = BUILT_IN
    ours = {*parts.scorers, *parts.filters, *parts.pickers}
    kinds = {
        "router scorer": (policy.weights, parts.scorers),
        "router filter": (policy.filters, parts.filters),
        "router picker": ([policy.picker], parts.pickers),
    }
    offered: list[EntryPoint] | None = None
    for kind, (names, known) in kinds.items():
        for name in dict.fromkeys(names):
            if name in ours:
                continue
            offered = list(offered_parts()) if offered is None else offered
            found = [point for point in offered if point.name == name]
            if not found:
                raise unknown_name(kind, name, {**known, **{point.name: point for point in offered}})
            if len(found) > 1:
                packages = " and ".join(sorted(_package(point) for point in found))
                raise ConfigurationError(f"{packages} both offer a router part {name!r}; uninstall one of them")
            parts = parts.with_part(name, _load(found[0]))
            ours.add(name)
    return parts


def offered_parts() -> Iterable[EntryPoint]:
    """Of all installed packages; nothing is imported."""
    return entry_points(group=GROUP)


def _load(point: EntryPoint) -> Scorer | Filter | MakePicker:
    try:
        found = point.load()
        made = found() if isinstance(found, type) else found
    except Exception as error:  # somebody else's code: whatever it raises
        raise ConfigurationError(
            f"the router part {point.name!r} ({point.value}, of the package {_package(point)}) cannot be loaded: {error!r}; "
            "mend or uninstall that package, or leave the part out"
        ) from error
    return cast("Scorer | Filter | Callable[[float], object]", made)  # type: ignore[return-value]


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "unknown"


def _number(name: str, weight: object) -> float:
    try:
        if isinstance(weight, str | int | float) and not isinstance(weight, bool):
            return float(weight)
    except ValueError:
        pass
    raise ValueError(f"the weight of {name!r} is {weight!r}, not a number; write for example uncached=2,requests=50")
