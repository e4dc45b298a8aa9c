"""Sizes and durations as people write them: `2GiB`, `500 MB`, `30s`, `1.5 min`."""

from __future__ import annotations

import re

_SIZE_UNITS = {
    "": 1,
    "b": 1,
    "k": 1024, "kib": 1024, "kb": 1000,
    "m": 1024**2, "mib": 1024**2, "mb": 1000**2,
    "g": 1024**3, "gib": 1024**3, "gb": 1000**3,
    "t": 1024**4, "tib": 1024**4, "tb": 1000**4,
}  # fmt: skip
_DURATION_UNITS_S = {"": 1.0, "ms": 1e-3, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*)\s*", re.ASCII)


def parse_size_bytes(text: str | int) -> int:
    """Bytes in `text`: a number, alone or with a unit. `GiB` and `G` count in powers of 1024, `GB` in powers of 1000.

    Raises: ValueError, with an example.
    """
    amount, unit = _split(text, "a size", "2GiB, 512MiB or 1500000000 (bytes)")
    factor = _SIZE_UNITS.get(unit.lower())
    if factor is None:
        raise ValueError(f"{text!r} is not a size: the unit {unit!r} is unknown; write for example 2GiB, 512MiB or 1500000000 (bytes)")
    return int(amount * factor)


def parse_duration_s(text: str | int | float) -> float:
    """Seconds in `text`: a number, alone (seconds) or with `ms`, `s`, `min`, `h`.

    Raises: ValueError, with an example.
    """
    amount, unit = _split(text, "a duration", "30s, 500ms or 2min")
    factor = _DURATION_UNITS_S.get(unit.lower())
    if factor is None:
        raise ValueError(f"{text!r} is not a duration: the unit {unit!r} is unknown; write for example 30s, 500ms or 2min")
    return amount * factor


def _split(text: str | int | float, kind: str, examples: str) -> tuple[float, str]:
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise ValueError(f"{text!r} is not {kind}; write for example {examples}")
    found = _AMOUNT.fullmatch(str(text))
    if found is None:
        raise ValueError(f"{text!r} is not {kind}; write for example {examples}")
    return float(found[1]), found[2]


def format_bytes(byte_count: float) -> str:
    """For people: `1.5 GiB`, `320 KiB`, `17 B`."""
    if byte_count < 1024:
        return f"{byte_count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        byte_count /= 1024
        if byte_count < 1024:
            return f"{byte_count:.1f} {unit}" if byte_count < 10 else f"{byte_count:.0f} {unit}"
    return f"{byte_count / 1024:.1f} TiB"
