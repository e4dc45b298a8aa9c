"""What SGLang's dependencies and its disaggregation take for granted of CUDA, done without. Imported by every Python of the environment.

Always: the operators that torchvision, whose wheel is built for CUDA, cannot load here and fails without. With SGLANG_CPU_TRANSFER=1:
pinned memory, streams and events, which the transfer between prefill and decode asks for and which mean nothing on a CPU; and the library
for RDMA, of which Mooncake uses nothing over TCP.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.abc
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

IBVERBS = Path(sys.prefix) / "ibverbs"  # where install_sglang.py puts it, if the system has none
LIBRARIES = ("libnl-3.so.200", "libnl-route-3.so.200", "libibverbs.so.1")  # each needs those before
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _Before(importlib.abc.MetaPathFinder):
    """Does something before a module is imported for the first time."""

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self._name = name
        self._act = act

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == self._name:
            sys.meta_path.remove(self)
            self._act()
        return None


def _declare_operators() -> None:
    import torch

    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", SCHEMA)


class _Nothing:
    """An event or a stream in which nothing is ever pending."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: 0


def _without_pinning(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, pin_memory: bool = False, **options: Any) -> Any:
        return make(*args, **options)

    return made


def _do_without_cuda() -> None:
    import torch

    for name in ("empty", "zeros", "ones", "tensor", "full", "empty_like", "arange"):
        setattr(torch, name, _without_pinning(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *_, **__: self
    torch.cuda.Event = torch.cuda.Stream = _Nothing
    for name in ("current_stream", "default_stream", "cudart"):
        setattr(torch.cuda, name, _Nothing)
    torch.cuda.stream = lambda *_, **__: contextlib.nullcontext()
    torch.cuda.synchronize = torch.cuda.set_stream = lambda *_, **__: None
    for name in ("synchronize", "wait_stream", "wait_event"):
        setattr(torch.cpu.Stream, name, lambda *_, **__: None)


def _load_ibverbs() -> None:
    for name in LIBRARIES:
        if (IBVERBS / name).exists():
            ctypes.CDLL(str(IBVERBS / name), ctypes.RTLD_GLOBAL)


sys.meta_path.insert(0, _Before("torchvision", _declare_operators))
if os.environ.get("SGLANG_CPU_TRANSFER") == "1":
    sys.meta_path.insert(0, _Before("sglang", _do_without_cuda))
    sys.meta_path.insert(0, _Before("mooncake", _load_ibverbs))
