"""Records a model's operations once and replays them without Python: with small models, Python is half of a decoding step.

A recording is right only if the model does the same operations whatever the numbers are. That is checked twice: torch warns where a model
looks at a tensor's values while it is recorded (experts that are picked, frequencies that depend on the length), and the recording's
logits are compared with the model's for other tokens, counts and positions. If anything is off, the model runs as it is.

While a recording runs, the interpreter's lock is free but for the attention calls, so the event loop is served all the time.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from polyphase.engines.torch.hook import attending
from polyphase.engines.torch.quiet import quiet_transformers

logger = logging.getLogger(__name__)

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(input_ids [1, T], position_ids [1, T], packed indices of the logits wanted [S]) → logits [1, S, vocab]"""

_MASK_MODULE = "masking_utils.py"  # looks at values to build a mask that nobody uses
_CHECKED_TOKEN_COUNTS = (1, 2, 5, 33)


class _LogitsOnly(nn.Module):
    """The model as a function of three tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor, keep: Tensor) -> Tensor:
        logits: Tensor = self._model(input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=keep).logits
        return logits


class _StandIn:
    """Attention without memory, to record and compare with: depends on all that it is given."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
        group = query.shape[1] // key.shape[1]
        mixed = query + torch.repeat_interleave(key * 0.5 - value, group, dim=1)
        return mixed.transpose(1, 2).contiguous()


def make_forward(model: PreTrainedModel, device: torch.device) -> Forward:
    """The fastest right way to run `model`. Cost: a few small forward passes."""
    plain = _LogitsOnly(model).eval()
    with torch.inference_mode(), attending(_StandIn()), quiet_transformers():
        recorded = _record(plain, model.config.vocab_size, device)
        if recorded is None or not _agree(plain, recorded, model.config, device):
            logger.info("%s is run without a recording", type(model).__name__)
            return plain
    return recorded


def _record(plain: nn.Module, vocab_size: int, device: torch.device) -> Forward | None:
    jit: Any = torch.jit
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            recording = jit.trace(plain, _example(7, vocab_size, 100, device), check_trace=False)
        except Exception as error:  # noqa: BLE001  a model may do anything at all
            logger.debug("the model cannot be recorded: %s", error)
            return None
    looked = [w for w in caught if issubclass(w.category, jit.TracerWarning) and not str(w.filename).endswith(_MASK_MODULE)]
    if looked:
        logger.debug("the model looks at values: %s:%d", looked[0].filename, looked[0].lineno)
        return None

    def replay(input_ids: Tensor, position_ids: Tensor, keep: Tensor) -> Tensor:
        with jit.optimized_execution(False):  # optimising for each new shape costs more than it brings
            logits: Tensor = recording(input_ids, position_ids, keep)
        return logits

    return replay


def _agree(plain: Forward, recorded: Forward, config: Any, device: torch.device) -> bool:
    furthest = int(getattr(config, "max_position_embeddings", None) or 1024) - 1
    for count in _CHECKED_TOKEN_COUNTS:
        example = _example(count, config.vocab_size, furthest, device)
        expected, found = plain(*example), recorded(*example)
        if expected.shape != found.shape or not torch.allclose(expected, found, rtol=1e-3, atol=1e-3, equal_nan=True):
            logger.warning("a recording of the model gives other logits for %d tokens", count)
            return False
    return True


def _example(count: int, vocab_size: int, furthest: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`count` packed tokens at odd positions, logits wanted of the first and the last."""
    numbers = torch.arange(count, device=device)
    tokens = (numbers * 7919 + count) % vocab_size
    positions = (numbers * 31) % furthest
    positions[-1] = furthest
    return tokens[None, :], positions[None, :], torch.tensor([0, count - 1], device=device)
