"""Stands where SGLang's CUDA kernels would: everything in it can be imported, and whatever is called says that it is not there."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__version__ = "999.0"
__path__: list[str] = []  # so that it passes for a package
_MISSING = "scalar_type"  # of which SGLang has one of its own, if the import fails


class Placeholder:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Placeholder:
        return _placeholder(self._name, name)

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"a stand-in for SGLang's CUDA kernels was called: {self._name}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Placeholder) and other._name == self._name

    def __hash__(self) -> int:
        return hash(self._name)


def _placeholder(owner: str, name: str) -> Placeholder:
    if name.startswith("__"):
        raise AttributeError(name)
    return Placeholder(f"{owner}.{name}")


def __getattr__(name: str) -> Placeholder:
    return _placeholder(__name__, name)


class _Loader(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []
        module.__getattr__ = lambda name: _placeholder(module.__name__, name)  # type: ignore[method-assign]


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(f"{__name__}.") or _MISSING in name:
            return None
        return importlib.machinery.ModuleSpec(name, _Loader(), is_package=True)


sys.meta_path.insert(0, _Finder())
