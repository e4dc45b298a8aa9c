"""Refusals of names that nobody knows, with the nearest that somebody does."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from polyphase.core.errors import ConfigurationError


def unknown(what: str, name: str, known: Iterable[str], hint: str = "") -> ConfigurationError:
    """`there is no model 'lama-70b'; did you mean llama-3.1-70b, llama-3.3-70b?`"""
    names = sorted(known)
    by_key = {entry.lower(): entry for entry in names}
    near = difflib.get_close_matches(name.lower(), by_key, 3, cutoff=0.5) or [key for key in by_key if name.lower() in key][:3]
    guess = f"did you mean {', '.join(by_key[key] for key in near)}?" if near else f"known are {', '.join(names)}"
    return ConfigurationError(f"there is no {what} {name!r}; {guess}{' ' + hint if hint else ''}")
