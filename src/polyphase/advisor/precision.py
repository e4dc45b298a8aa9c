"""Number formats: bytes that a weight takes, and which of the accelerator's peaks its products run at."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from polyphase.advisor.naming import unknown


class Peak(enum.StrEnum):
    BF16 = "bf16"
    FP8 = "fp8"
    FP4 = "fp4"


@dataclass(frozen=True, slots=True)
class WeightFormat:
    name: str
    bytes_per_weight: float  # scales included
    peak: Peak


# Scales: one fp32 a 128 × 128 block for fp8_block; one fp8 a 16 for nvfp4; one byte a 32 for mxfp4; one bf16 a 32 for int4.
FORMATS = {
    entry.name: entry
    for entry in (
        WeightFormat("bf16", 2.0, Peak.BF16),
        WeightFormat("fp8", 1.0, Peak.FP8),
        WeightFormat("fp8_block", 1.0 + 4 / 128**2, Peak.FP8),
        WeightFormat("nvfp4", 0.5 + 1 / 16, Peak.FP4),
        WeightFormat("mxfp4", 0.5 + 1 / 32, Peak.FP4),
        WeightFormat("int4_wo", 0.5 + 2 / 32, Peak.BF16),
    )
}
_ALIASES = {"fp4": "nvfp4", "int4": "int4_wo", "fp16": "bf16", "float16": "bf16", "bfloat16": "bf16", "int8": "fp8", "w4a16": "int4_wo"}


@dataclass(frozen=True, slots=True)
class Precision:
    """Formats of a deployment: dense matrices, routed experts, KV cache (bytes per number)."""

    gemm: WeightFormat
    experts: WeightFormat
    kv_bytes: float

    @property
    def name(self) -> str:
        return self.gemm.name if self.gemm is self.experts else f"{self.gemm.name}+{self.experts.name}"


def weight_format(name: str) -> WeightFormat:
    """Raises: ConfigurationError with the nearest names."""
    key = name.strip().lower()
    key = _ALIASES.get(key, key)
    if key not in FORMATS:
        raise unknown("precision", name, FORMATS)
    return FORMATS[key]


def parse_precision(text: str, kv_bytes: float | None = None) -> Precision:
    """`fp8`, or `bf16+mxfp4` for dense matrices and experts. The KV cache takes one byte where the dense matrices take one or less.

    Raises: ConfigurationError.
    """
    first, _, second = text.partition("+")
    gemm = weight_format(first)
    experts = weight_format(second) if second else gemm
    return Precision(gemm, experts, kv_bytes if kv_bytes is not None else (1.0 if gemm.bytes_per_weight < 2 else 2.0))
