"""LoRA adapters beside a model: which rows of a step go through which adapter, layer by layer.

    packed tokens   | a: base | b: sql | c: sql | d: base | e: poet |
    y = W x         all of them at once
    y += B (A x)    for the rows of sql, then for those of poet          s = alpha / r is part of B

A linear layer that any adapter changes is wrapped once; the wrapper hands its input and output to an operator, which finds the step under
way as the attention does (`hook`), so that a recorded model works with adapters, too. Source: Hu et al., LoRA, 2021; PEFT's files.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import blake3
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from polyphase.core.errors import ModelLoadError
from polyphase.engines.adapter_files import WEIGHTS, adapter_folder, read_adapter_config

_PREFIX = "base_model.model."
_HALVES = (".lora_A.weight", ".lora_B.weight")
_REFUSED: Mapping[str, tuple[object, ...]] = {  # what the configuration may say of what is not done here
    "use_dora": (False,),
    "bias": ("none",),
    "modules_to_save": (),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "trainable_token_indices": (),
}


@dataclass(frozen=True, slots=True)
class Change:
    """What an adapter does to one layer: `down` is A, [r, in]; `up` is s B, [out, r]."""

    down: Tensor
    up: Tensor


class Adapters:
    """Those that a model was given. `digest` names their content; empty without any."""

    def __init__(self, changes: Mapping[str, Mapping[int, Change]], digest: str) -> None:
        self.digest = digest
        self._changes = changes

    @property
    def names(self) -> list[str]:
        return sorted(self._changes)

    def step(self, adapter_of_rows: Sequence[str | None], row_lengths: Sequence[int], device: torch.device) -> StepAdapters | None:
        """For packed rows in their order; None if none of them has an adapter."""
        tokens: dict[str, list[int]] = {}
        first = 0
        for name, length in zip(adapter_of_rows, row_lengths, strict=True):
            if name is not None:
                tokens.setdefault(name, []).extend(range(first, first + length))
            first += length
        if not tokens:
            return None
        parts = [
            (None if len(places) == first else torch.tensor(places, device=device), self._changes[name]) for name, places in tokens.items()
        ]
        return StepAdapters(first, parts)


@dataclass(frozen=True, slots=True)
class StepAdapters:
    """`parts`: packed tokens (None: all) and the changes that they go through, by the layer's place."""

    token_count: int
    parts: list[tuple[Tensor | None, Mapping[int, Change]]]

    def apply(self, inputs: Tensor, outputs: Tensor, place: int) -> None:
        """
        Args:
            inputs: [.., T, in]; outputs: [.., T, out], changed in place; all dimensions before T are 1.
        """
        x, y = inputs.reshape(-1, inputs.shape[-1]), outputs.view(-1, outputs.shape[-1])
        if len(x) != self.token_count:
            raise RuntimeError(f"a layer with a LoRA adapter was given {len(x)} of {self.token_count} tokens")
        for rows, changes in self.parts:
            change = changes.get(place)
            if change is None:
                continue
            if rows is None:
                y += x @ change.down.T @ change.up.T
            else:
                y.index_add_(0, rows, x[rows] @ change.down.T @ change.up.T)


class _Current(threading.local):
    step: StepAdapters | None = None


_current = _Current()
_library: Any = cast(Any, torch.library.Library)("polyphase_lora", "DEF")  # lives as long as the process: so do operators
_library.define("adapt_(Tensor inputs, Tensor(a!) outputs, int place) -> Tensor(a!)")


def _adapt(inputs: Tensor, outputs: Tensor, place: int) -> Tensor:
    if _current.step is not None:
        _current.step.apply(inputs, outputs, place)
    return outputs


_library.impl("adapt_", _adapt, "CompositeExplicitAutograd")


@contextmanager
def adapting(step: StepAdapters | None) -> Iterator[None]:
    """Within this, in this thread, models go through these adapters."""
    _current.step = step
    try:
        yield
    finally:
        _current.step = None


class _AdaptedLinear(nn.Module):
    def __init__(self, base: nn.Linear, place: int) -> None:
        super().__init__()
        self.base = base
        self._place = place

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = torch.ops.polyphase_lora.adapt_(inputs, self.base(inputs), self._place)
        return outputs


def add_adapters(model: PreTrainedModel, folders: Mapping[str, str]) -> Adapters:
    """Load them and wrap the layers that they change. Raises: ModelLoadError, with the adapter and what is wrong with it."""
    places: dict[str, int] = {}
    changes: dict[str, dict[int, Change]] = {}
    digest = blake3.blake3(derive_key_context="polyphase 2026 lora adapters")
    for name, location in sorted(folders.items()):
        folder = adapter_folder(name, location)
        halves = _read_halves(name, folder)
        changes[name] = {}
        digest.update(f"{len(name)}:{name}".encode())
        config = read_adapter_config(name, folder)
        for layer, (down, up) in sorted(halves.items()):
            linear = _linear(model, name, layer)
            if down.shape[1] != linear.in_features or up.shape[0] != linear.out_features or down.shape[0] != up.shape[1]:
                raise ModelLoadError(f"the LoRA adapter {name!r} was made for another model: {layer} has other dimensions here")
            scaled = up.float() * _scale(config, layer, down.shape[0])
            change = Change(down.to(linear.weight), scaled.to(linear.weight))  # its device and type
            changes[name][places.setdefault(layer, len(places))] = change
            digest.update(layer.encode())
            for half in (down, scaled):
                digest.update(half.float().contiguous().numpy().tobytes())
    for layer, place in places.items():
        model.set_submodule(layer, _AdaptedLinear(cast(nn.Linear, model.get_submodule(layer)), place))
    return Adapters(changes, digest.hexdigest(16) if folders else "")


def _read_halves(name: str, folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """By layer: A and B. Raises: ModelLoadError."""
    config = read_adapter_config(name, folder)
    if config.get("peft_type", "LORA") != "LORA":
        raise ModelLoadError(f"the adapter {name!r} is {config['peft_type']}; the torch engine runs LoRA adapters")
    for key, accepted in _REFUSED.items():
        if (found := config.get(key)) and found not in accepted:
            raise ModelLoadError(f"the LoRA adapter {name!r} has {key} = {found!r}, which the torch engine does not do")
    try:
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:  # safetensors raises its own kinds
        raise ModelLoadError(f"{folder / WEIGHTS} of the LoRA adapter {name!r} cannot be read: {error}") from error
    found_halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        half = next((half for half in _HALVES if key.endswith(half)), None)
        if half is None or not key.startswith(_PREFIX) or tensor.dim() != 2:
            raise ModelLoadError(f"the LoRA adapter {name!r} changes {key}, which the torch engine does not do: only linear layers can be")
        found_halves.setdefault(key.removeprefix(_PREFIX).removesuffix(half), {})[half] = tensor
    if lone := [layer for layer, both in found_halves.items() if len(both) != 2]:
        raise ModelLoadError(f"the LoRA adapter {name!r} has only one of A and B for {lone[0]}")
    return {layer: (both[_HALVES[0]], both[_HALVES[1]]) for layer, both in found_halves.items()}


def _linear(model: PreTrainedModel, name: str, layer: str) -> nn.Linear:
    try:
        found = model.get_submodule(layer)
    except AttributeError:
        raise ModelLoadError(f"the LoRA adapter {name!r} was made for another model: this one has no {layer}") from None
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(found, nn.Linear) or found is output:
        raise ModelLoadError(f"the LoRA adapter {name!r} changes {layer}, which is not a linear layer between the embeddings")
    return found


def _scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Source: PEFT; patterns name the end of a layer's name."""
    alpha = config.get("lora_alpha", rank)
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if layer == pattern or layer.endswith(f".{pattern}"):
            alpha = own
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
