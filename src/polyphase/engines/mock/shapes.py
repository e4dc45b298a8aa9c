"""The imagined model and the imagined accelerator, by name or by their figures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from polyphase.core.errors import ConfigurationError

_BYTES_PER_NUMBER = 2  # weights and KV in 16 bits


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a step's time depends on."""

    parameter_count: float
    layer_count: int
    kv_head_count: int
    query_head_count: int
    head_dim: int
    context_length: int

    @property
    def weight_bytes(self) -> float:
        return self.parameter_count * _BYTES_PER_NUMBER

    @property
    def kv_bytes_per_token(self) -> int:
        return self.layer_count * 2 * self.kv_head_count * self.head_dim * _BYTES_PER_NUMBER

    @property
    def flops_per_token(self) -> float:
        """Of the linear layers."""
        return 2 * self.parameter_count

    @property
    def flops_per_pair(self) -> float:
        """Of the attention, for each token and each token that it sees."""
        return 4 * self.layer_count * self.query_head_count * self.head_dim


@dataclass(frozen=True, slots=True)
class Accelerator:
    """Nominal peaks; of several that share a model, their sums."""

    flops_per_s: float
    bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float = 50e9  # at which KV blocks come from other workers

    def times(self, count: int) -> Accelerator:
        return Accelerator(self.flops_per_s * count, self.bytes_per_s * count, self.memory_bytes * count, self.link_bytes_per_s * count)


MODELS: Mapping[str, ModelShape] = {
    "qwen3-0.6b": ModelShape(0.6e9, 28, 8, 16, 128, 40_960),
    "llama-3.1-8b": ModelShape(8.03e9, 32, 8, 32, 128, 131_072),
    "qwen3-32b": ModelShape(32.8e9, 64, 8, 64, 128, 40_960),
    "llama-3.1-70b": ModelShape(70.6e9, 80, 8, 64, 128, 131_072),
}
# Source: NVIDIA's data sheets, dense 16-bit.
ACCELERATORS: Mapping[str, Accelerator] = {
    "a100": Accelerator(312e12, 2.04e12, 80e9),
    "h100": Accelerator(989e12, 3.35e12, 80e9),
    "h200": Accelerator(989e12, 4.8e12, 141e9),
    "b200": Accelerator(2250e12, 7.7e12, 180e9),
}
_MODEL_FORM = "parameters=8e9,layers=32,kv-heads=8,head-dim=128"
_ACCELERATOR_FORM = "tflops=989,gb-per-s=3350,memory-gb=80"


def parse_model_shape(text: str) -> ModelShape:
    """A name, or `parameters=8e9,layers=32,kv-heads=8,head-dim=128` and perhaps `query-heads=32,context=131072`.

    Raises: ConfigurationError.
    """
    if text in MODELS:
        return MODELS[text]
    values = _figures(text, "mock model", MODELS, _MODEL_FORM, optional=("query-heads", "context"))
    kv_head_count = int(values["kv-heads"])
    return ModelShape(
        parameter_count=values["parameters"],
        layer_count=int(values["layers"]),
        kv_head_count=kv_head_count,
        query_head_count=int(values.get("query-heads", 4 * kv_head_count)),
        head_dim=int(values["head-dim"]),
        context_length=int(values.get("context", 131_072)),
    )


def parse_accelerator(text: str) -> Accelerator:
    """A name, several such as `4xh100`, or `tflops=989,gb-per-s=3350,memory-gb=80` and perhaps `link-gb-per-s=50`.

    Raises: ConfigurationError.
    """
    several = re.fullmatch(r"(\d+)x(.+)", text)
    count, name = (int(several[1]), several[2]) if several else (1, text)
    if name in ACCELERATORS and count >= 1:
        return ACCELERATORS[name].times(count)
    values = _figures(text, "mock accelerator", ACCELERATORS, _ACCELERATOR_FORM, optional=("link-gb-per-s",))
    made = Accelerator(values["tflops"] * 1e12, values["gb-per-s"] * 1e9, values["memory-gb"] * 1e9)
    return replace(made, link_bytes_per_s=values["link-gb-per-s"] * 1e9) if "link-gb-per-s" in values else made


def _figures(text: str, what: str, known: Mapping[str, object], form: str, optional: tuple[str, ...]) -> dict[str, float]:
    wanted = [part.partition("=")[0] for part in form.split(",")]
    values: dict[str, float] = {}
    for part in text.split(","):
        key, _, figure = part.partition("=")
        try:
            values[key.strip()] = float(figure)
        except ValueError:
            break
    is_complete = set(wanted) <= values.keys() <= {*wanted, *optional} and len(values) == len(text.split(","))
    if not is_complete or not all(0 < value < float("inf") for value in values.values()):
        raise ConfigurationError(f"there is no {what} {text!r}; name one of {', '.join(known)}, or give its figures: {form}")
    return values
