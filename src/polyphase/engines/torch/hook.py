"""How a model's attention calls reach us: functions registered with transformers pass them on to the step under way.

transformers calls the registered function in every layer. It finds the step under way in a thread's own variable, so that nothing has to
travel through the model; and it finds it by way of a torch operator, so that a traced model (see `tracing`) finds it, too.

What a model asks for beyond causal attention with a window (soft-capping, sinks, biases) is refused by an error, never ignored: ignoring
it gives wrong answers that look right.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from polyphase.core.errors import ModelLoadError

ATTENTION_NAME = "polyphase_paged"
_HARMLESS = frozenset({"position_ids", "use_cache", "cache_position", "is_causal"})


class PagedAttention(Protocol):
    """One step's attention."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
        """
        Args:
            query: [1, query_heads, T, head_dim], rotated; key, value: [1, kv_heads, T, head_dim].
            scaling: of the scores; None: one over the root of head_dim.
            window: tokens that a token sees, itself included; None: all.

        Returns: [1, T, query_heads, head_dim].
        """


class StepInterrupted(Exception):
    """The step under way is not wanted any more."""


class InterruptibleAttention:
    """Asks before each layer whether to go on."""

    def __init__(self, attention: PagedAttention, is_interrupted: Callable[[], bool]) -> None:
        self._attention = attention
        self._is_interrupted = is_interrupted

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
        if self._is_interrupted():
            raise StepInterrupted
        return self._attention.attend(layer, query, key, value, scaling, window)


class _Current(threading.local):
    step: PagedAttention | None = None


_current = _Current()
_library: Any = cast(Any, torch.library.Library)("polyphase", "DEF")  # lives as long as the process: so do operators
_library.define("attend(Tensor query, Tensor key, Tensor value, int layer, float? scaling, int? window) -> Tensor")


def register() -> None:
    """Make the attention known to transformers, under a name of our own. Calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, _attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


@contextmanager
def attending(step: PagedAttention) -> Iterator[None]:
    """Within this, in this thread, models attend through `step`."""
    _current.step = step
    try:
        yield
    finally:
        _current.step = None


def _no_mask(*_: object, **__: object) -> None:
    """Packed sequences need no mask of the model's making."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    unknown = [name for name, setting in others.items() if setting is not None and setting is not False and name not in _HARMLESS]
    if unknown or attention_mask is not None or dropout or others.get("is_causal") is False:
        asked = unknown or ["attention_mask" if attention_mask is not None else "dropout" if dropout else "is_causal=False"]
        raise ModelLoadError(f"{type(module).__name__} asks attention for {', '.join(sorted(asked))}, which the torch engine does not do")
    return torch.ops.polyphase.attend(query, key, value, module.layer_idx, scaling, sliding_window), None


def _attend(query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float | None, window: int | None) -> Tensor:
    if _current.step is None:
        raise RuntimeError("a model with the engine's attention was called outside of a step")
    return _current.step.attend(layer, query, key, value, scaling, window)


_library.impl("attend", _attend, "CompositeExplicitAutograd")
