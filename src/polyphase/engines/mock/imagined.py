"""The imagined model on imagined accelerators, by name or by their figures; what they are like, the advisor knows."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from polyphase.advisor.accelerators import Accelerator, accelerator_from_table
from polyphase.advisor.catalog import Library, shipped_library
from polyphase.advisor.counts import kv_bytes_of_sequence
from polyphase.advisor.deployment import Setting
from polyphase.advisor.mapping import Mappings, ParallelMapping, kv_heads_share
from polyphase.advisor.memory import weight_bytes
from polyphase.advisor.precision import parse_precision
from polyphase.advisor.shapes import AttentionKind, AttentionShape, ModelShape
from polyphase.core.errors import ConfigurationError

BACKEND = "vllm"  # the engine whose measured step times are imagined
_CONTEXT_TOKENS = 4096  # at which the cache's bytes per token are taken: windowed layers hold less of longer contexts
_MODEL_FORM = "parameters=8e9,layers=32,kv-heads=8,head-dim=128"
_ACCELERATOR_FORM = "tflops=989,gb-per-s=3350,memory-gb=80"
_LINK_GB_S = 50.0  # at which KV comes from other workers, if not said


@dataclass(frozen=True, slots=True)
class Imagined:
    """One worker: a model, spread over one or more accelerators."""

    setting: Setting
    mapping: ParallelMapping

    @property
    def accelerator_count(self) -> int:
        return self.mapping.gpu_count

    @property
    def weight_bytes(self) -> float:
        """Of all accelerators together."""
        each = weight_bytes(self.setting.shape, self.setting.precision, Mappings.of([self.mapping]))
        return float(each[0]) * self.accelerator_count

    @property
    def memory_bytes(self) -> float:
        return self.setting.accelerator.memory_bytes * self.accelerator_count

    @property
    def kv_bytes_per_token(self) -> int:
        """Of all accelerators together: what several hold alike is counted as often."""
        shape = self.setting.shape
        whole = float(kv_bytes_of_sequence(shape, self.setting.precision, float(_CONTEXT_TOKENS))) / _CONTEXT_TOKENS
        share = float(kv_heads_share(shape, Mappings.of([self.mapping]).tp)[0])
        return math.ceil(whole * share * self.accelerator_count)

    @property
    def link_bytes_per_s(self) -> float:
        return self.setting.accelerator.network_bytes_per_s * self.accelerator_count


def imagine(model: str, accelerator: str) -> Imagined:
    """`model`: a name that the advisor knows, or `parameters=8e9,layers=32,kv-heads=8,head-dim=128` and perhaps
    `query-heads=32,context=131072`. `accelerator`: a name, several such as `4xh100`, or `tflops=989,gb-per-s=3350,memory-gb=80` and
    perhaps `link-gb-per-s=50`. Weights are as published; several accelerators share every layer (tensor parallelism), and the
    experts among them as far as they divide.

    Raises: ConfigurationError.
    """
    library = shipped_library()
    shape = _shape_from_figures(model) if "=" in model else library.model(model)
    count, sheet = _accelerators(accelerator, library)
    heads = shape.attention.query_head_count
    if heads % count:
        raise ConfigurationError(f"{count} accelerators cannot share the {heads} heads of {model}; take a number that divides them")
    mapping = ParallelMapping(tp=count)
    if shape.experts is not None:
        experts_over = math.gcd(shape.experts.expert_count, count)
        mapping = ParallelMapping(tp=count, moe_ep=experts_over, moe_tp=count // experts_over)
    return Imagined(Setting(shape, sheet, parse_precision(shape.native_precision), BACKEND), mapping)


def _accelerators(text: str, library: Library) -> tuple[int, Accelerator]:
    if "=" in text:
        return 1, _accelerator_from_figures(text)
    several = re.fullmatch(r"([1-9]\d*)x(.+)", text)
    return (int(several[1]), library.accelerator(several[2])) if several else (1, library.accelerator(text))


def _shape_from_figures(text: str) -> ModelShape:
    """A dense model: what is not attention is in its feed-forward layers."""
    values = _figures(text, "mock model", _MODEL_FORM, optional=("query-heads", "context"))
    layers, kv_heads, head_dim = int(values["layers"]), int(values["kv-heads"]), int(values["head-dim"])
    heads = int(values.get("query-heads", 4 * kv_heads))
    hidden = heads * head_dim
    attention = 2 * hidden * (heads + kv_heads) * head_dim
    rest = values["parameters"] / layers - attention
    if rest <= 0:
        raise ConfigurationError(f"the mock model {text!r} has more parameters in its attention than in all; is a zero missing?")
    return ModelShape(
        name=text,
        hidden_size=hidden,
        vocabulary_size=0,
        attention=AttentionShape(AttentionKind.GROUPED, heads, kv_heads, head_dim, head_dim),
        full_layer_count=layers,
        dense_layer_count=layers,
        dense_intermediate_size=round(rest / (3 * hidden)),
        has_tied_embeddings=True,
        context_length=int(values.get("context", 131_072)),
    )


def _accelerator_from_figures(text: str) -> Accelerator:
    values = _figures(text, "mock accelerator", _ACCELERATOR_FORM, optional=("link-gb-per-s",))
    link = values.get("link-gb-per-s", _LINK_GB_S)
    sheet = {
        "name": text,
        "bf16_tflops": values["tflops"],
        "memory_tb_s": values["gb-per-s"] / 1e3,
        "memory_gb": values["memory-gb"],
        "link_gb_s": link,
        "network_gb_s": link,
        "domain_gpus": 1,
    }
    return accelerator_from_table(sheet, f"the mock accelerator {text!r}")


def _figures(text: str, what: str, form: str, optional: tuple[str, ...]) -> dict[str, float]:
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
        raise ConfigurationError(f"the figures of the {what} {text!r} are not complete; write for example {form}")
    return values
