"""Weights of tenants as people write them: `acme=3, lab=0.5` in a flag or variable, a table in a file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

_EXAMPLE = "acme=3,lab=0.5"
_NAME = re.compile(r"[A-Za-z0-9._:@/-]{1,128}")  # as in the header x-polyphase-tenant
LEAST, MOST = 0.001, 1000.0


def parse_tenant_weights(given: str | Mapping[str, float]) -> dict[str, float]:
    """Raises: ValueError, with an example."""
    if isinstance(given, str):
        pairs = [part.partition("=") for part in given.split(",") if part.strip()]
        if any(not equals for _, equals, _ in pairs):
            raise ValueError(f"{given!r} is not a list of tenants with weights; write for example {_EXAMPLE}")
        entries: list[tuple[str, object]] = [(name.strip(), weight.strip()) for name, _, weight in pairs]
    elif isinstance(given, Mapping):
        entries = list(given.items())
    else:
        raise ValueError(f"{given!r} is not a list of tenants with weights; write for example {_EXAMPLE}")
    weights: dict[str, float] = {}
    for name, weight in entries:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be a tenant: use 1 to 128 letters, digits or any of . _ : @ / -")
        if name in weights:
            raise ValueError(f"'{name}' has two weights; give it one")
        weights[name] = _weight(name, weight)
    return weights


def _weight(name: str, given: object) -> float:
    try:
        weight = float(given) if isinstance(given, str | int | float) and not isinstance(given, bool) else math.nan
    except ValueError:
        weight = math.nan
    if not LEAST <= weight <= MOST:
        raise ValueError(f"'{name}' cannot have the weight {given!r}; write a number between {LEAST} and {MOST:g}, as in {_EXAMPLE}")
    return weight


def format_tenant_weights(weights: Mapping[str, float]) -> str:
    return ",".join(f"{name}={weight:g}" for name, weight in weights.items())
