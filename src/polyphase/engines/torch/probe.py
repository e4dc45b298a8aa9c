"""Finds out what a model asks of attention by running two tokens through it, instead of guessing from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from polyphase.core.errors import ModelLoadError
from polyphase.engines.torch.hook import attending


@dataclass(frozen=True, slots=True)
class LayerShape:
    kv_head_count: int
    head_dim: int
    window: int | None  # tokens; None: sees everything


class _ProbeAttention:
    """Answers zeros and writes down what it was asked."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerShape] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
        if key.shape != value.shape or query.shape[3] != key.shape[3]:
            raise ModelLoadError(
                f"layer {layer} has keys of shape {tuple(key.shape)} and values of shape {tuple(value.shape)}; "
                "the torch engine keeps both in blocks of one shape"
            )
        if layer in self.layers:
            raise ModelLoadError(f"layer {layer} computes attention twice in one pass, which the torch engine does not do")
        self.layers[layer] = LayerShape(key.shape[1], key.shape[3], window)
        return torch.zeros_like(query.transpose(1, 2))


def probe_layers(model: PreTrainedModel, device: torch.device) -> list[LayerShape]:
    """What each decoder layer keeps in the cache.

    Raises: ModelLoadError if some layer does not use the registered attention, or they differ in shape.
    """
    probe = _ProbeAttention()
    tokens = torch.zeros((1, 2), dtype=torch.int64, device=device)
    forward: Callable[..., object] = model
    try:
        with torch.inference_mode(), attending(probe):
            forward(
                input_ids=tokens,
                position_ids=torch.arange(2, device=device)[None, :],
                use_cache=False,
                logits_to_keep=torch.tensor([1], device=device),
            )
    except ModelLoadError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, RuntimeError, NotImplementedError) as error:
        raise ModelLoadError(f"{type(model).__name__} cannot be driven by the torch engine: {_first_line(error)}") from error
    layer_count = model.config.num_hidden_layers
    if sorted(probe.layers) != list(range(layer_count)):
        raise ModelLoadError(
            f"{type(model).__name__} uses ordinary attention in {len(probe.layers)} of its {layer_count} layers; "
            "the torch engine runs models that use it in all"
        )
    shapes = {(shape.kv_head_count, shape.head_dim) for shape in probe.layers.values()}
    if len(shapes) != 1:
        raise ModelLoadError(f"the layers of {type(model).__name__} differ in their key and value heads: {sorted(shapes)}")
    return [probe.layers[layer] for layer in range(layer_count)]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
