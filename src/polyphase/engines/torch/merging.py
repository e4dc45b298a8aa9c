"""Attention of a prompt's later chunk in two parts, past and own, merged by the weights of their softmaxes.

    own tokens │ see all of the past │ and a triangle of their own
               │ no mask needed      │ the kernel's own causal case

A mask over both would compute the other triangle as well, and read as many numbers as there are scores. The weights come from torch's CPU
kernel itself, which hands them out under a name that is not public: so whether it is there, and right, is tried out once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_KERNEL = "_scaled_dot_product_flash_attention_for_cpu"

Kernel = Callable[..., tuple[Tensor, Tensor]]


def merged_attention(query: Tensor, past: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], scaling: float | None) -> Tensor:
    """
    Args:
        query: [1, query_heads, n, head_dim]; past, own: keys and values [1, kv_heads, tokens, head_dim], own with n tokens.

    Returns: [1, query_heads, n, head_dim].
    """
    kernel: Kernel = getattr(torch.ops.aten, _KERNEL)
    from_past, past_weight = kernel(query, *past, scale=scaling)
    from_own, own_weight = kernel(query, *own, is_causal=True, scale=scaling)
    share = torch.sigmoid(past_weight - own_weight).unsqueeze(-1)  # the weights are logarithms of the softmaxes' sums
    return torch.lerp(from_own, from_past, share.to(from_own.dtype))


@cache
def can_merge(device_type: str, dtype: torch.dtype) -> bool:
    """Whether `merged_attention` works with this torch, here. Cost: one tiny attention, the first time."""
    if device_type != "cpu" or not hasattr(torch.ops.aten, _KERNEL):
        return False
    generator = torch.Generator().manual_seed(0)
    query = torch.randn((1, 4, 3, 16), generator=generator).to(dtype)
    keys, values = torch.randn((2, 1, 2, 8, 16), generator=generator).to(dtype)
    is_seen = torch.arange(8) <= torch.arange(5, 8)[:, None]
    wide_keys, wide_values = (part.repeat_interleave(2, dim=1) for part in (keys, values))
    expected = scaled_dot_product_attention(query, wide_keys, wide_values, attn_mask=is_seen, scale=0.3)
    try:
        found = merged_attention(query, (keys[:, :, :5], values[:, :, :5]), (keys[:, :, 5:], values[:, :, 5:]), 0.3)
    except (RuntimeError, TypeError, ValueError):
        return False
    return found.shape == expected.shape and torch.allclose(found.float(), expected.float(), rtol=2e-2, atol=2e-2)
