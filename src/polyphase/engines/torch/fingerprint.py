"""A name for a model's weights, so that KV blocks computed with others are never taken for its own."""

from __future__ import annotations

import blake3
import torch
from transformers import PreTrainedModel

_SAMPLES = 256  # elements of each tensor that are hashed as they are
_NOT_THE_MODEL = frozenset({"transformers_version", "_name_or_path"})
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def weights_fingerprint(model: PreTrainedModel) -> str:
    """32 hexadecimal digits over names, shapes, types, a sample and the sum of the bits of all parameters, and the configuration.

    The same folder, or a copy elsewhere, gives the same digits in every process; a fine-tuned model gives others.
    Cost: one pass over the weights.
    """
    digest = blake3.blake3(derive_key_context="polyphase 2026 model weights")
    config = {key: value for key, value in sorted(model.config.to_dict().items()) if key not in _NOT_THE_MODEL}
    digest.update(repr(config).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not flat.numel():
            continue
        bits = flat.view(_BITS[flat.element_size()])
        digest.update(int(bits.sum(dtype=torch.int64)).to_bytes(8, "little", signed=True))
        step = max(1, flat.numel() // _SAMPLES)
        digest.update(bits[::step].cpu().numpy().tobytes())
    return digest.hexdigest(16)
