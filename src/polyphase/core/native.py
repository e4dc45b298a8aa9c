"""Whether the C++ extension is in use. Without it everything works, with the Python implementations beside it.

The extension is built when the package is installed and there is a compiler; see `hatch_build.py`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

RECIPE = 5  # what this source expects of the extension; raised on both sides with every change of its interface or of a hash


def _load() -> tuple[ModuleType | None, str]:
    try:
        found = importlib.import_module("polyphase.core._native")
    except ImportError as error:
        is_missing = isinstance(error, ModuleNotFoundError)
        why = "it was not built: no C++ compiler or no Python headers at installation" if is_missing else str(error)
        return None, f"pure Python: the extension is not there ({why}); reinstall with a compiler for faster routing"
    recipe = getattr(found, "RECIPE", None)
    if recipe != RECIPE:
        return None, f"pure Python: the extension at {found.__file__} was built from other source ({recipe}, not {RECIPE}); reinstall"
    return found, f"native: {found.__file__}"


extension, _status = _load()


def status() -> str:
    """One line for a person: `native: <file>`, or `pure Python: <why>`."""
    return _status


def is_native() -> bool:
    return extension is not None
