"""Loads a model's weights and finds out whether this engine computes it rightly; says in one sentence why not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from polyphase.core.errors import ModelLoadError
from polyphase.engines.torch.fingerprint import weights_fingerprint
from polyphase.engines.torch.hook import ATTENTION_NAME, register
from polyphase.engines.torch.probe import LayerShape, probe_layers
from polyphase.engines.torch.quiet import quiet_transformers
from polyphase.engines.torch.settings import TorchSettings

_ORDINARY_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: PreTrainedModel
    config: PretrainedConfig
    generation: GenerationConfig
    layers: list[LayerShape]
    dtype: torch.dtype
    device: torch.device
    vocab_size: int
    max_context_length: int | None  # as the configuration says
    fingerprint: str


def load_model(settings: TorchSettings) -> LoadedModel:
    """Raises: ModelLoadError."""
    register()
    device = _device(settings.device)
    with quiet_transformers():
        return _load(settings, device)


def _load(settings: TorchSettings, device: torch.device) -> LoadedModel:
    config = _load_config(settings.model)
    _check_architecture(settings.model, config)
    model = _load_weights(settings, config, device)
    layers = probe_layers(model, device)
    max_context_length = _max_context_length(config)
    _check_windows(config, layers, settings.context_length or max_context_length)
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return LoadedModel(
        model=model,
        config=config,
        generation=model.generation_config or GenerationConfig(),  # type: ignore[no-untyped-call]
        layers=layers,
        dtype=model.dtype,
        device=device,
        vocab_size=output.weight.shape[0] if output is not None else config.vocab_size,
        max_context_length=max_context_length,
        fingerprint=weights_fingerprint(model),
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelLoadError(f"{name!r} is not a device: write cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelLoadError(f"the torch engine runs on cpu and cuda, not on {name}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError(f"device {name} was asked for, but torch {torch.__version__} sees no CUDA device on this machine")
    return device


def _dtype(settings: TorchSettings, device: torch.device) -> Any:
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    return torch.float32 if device.type == "cpu" else "auto"


def _load_config(model: str) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(_location(model), trust_remote_code=False)
    except Exception as error:  # transformers, json and the hub client raise whatever they like
        raise ModelLoadError(f"the configuration of {model} cannot be read: {_sentence(error)}") from error
    return config


def _load_weights(settings: TorchSettings, config: PretrainedConfig, device: torch.device) -> PreTrainedModel:
    auto: Any = AutoModelForCausalLM
    try:
        model, info = auto.from_pretrained(
            _location(settings.model),
            config=config,
            dtype=_dtype(settings, device),
            attn_implementation=ATTENTION_NAME,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelLoadError(f"the weights of {settings.model} cannot be loaded: {_sentence(error)}") from error
    for kind, what in (("missing_keys", "are missing"), ("mismatched_keys", "have another shape than the configuration says")):
        if names := sorted(str(name) for name in info.get(kind, ())):
            raise ModelLoadError(f"{len(names)} weights of {settings.model} {what}, {names[0]} among them")
    if next(model.parameters()).dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelLoadError(f"weights of type {model.dtype} are not supported: choose float32, bfloat16 or float16")
    loaded: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return loaded


def _check_architecture(model: str, config: PretrainedConfig) -> None:
    """Refuse what would run and give wrong answers."""
    kind = f"{model} ({config.model_type})"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelLoadError(f"{kind} is an encoder-decoder model; the torch engine runs decoder-only models")
    if any(getattr(config, name, None) is not None for name in ("vision_config", "audio_config", "text_config")):
        raise ModelLoadError(f"{kind} is a multimodal model; the torch engine runs models of text only")
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - _ORDINARY_LAYERS)
    if odd:
        raise ModelLoadError(f"{kind} has layers of type {', '.join(odd)}; the torch engine knows full and sliding attention")
    if getattr(config, "attention_chunk_size", None) is not None:
        raise ModelLoadError(f"{kind} uses chunked attention, which the torch engine does not do")
    if getattr(config, "alibi", False):
        raise ModelLoadError(f"{kind} uses ALiBi positions, which the torch engine does not do")
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise ModelLoadError(f"the configuration of {kind} does not say how many layers it has")


def _check_windows(config: PretrainedConfig, layers: list[LayerShape], context_length: int | None) -> None:
    """Some models put their sliding window into the mask alone, which they do not get from us."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(layers)
    untold = [i for i, (kind, shape) in enumerate(zip(kinds, layers, strict=True)) if kind == "sliding_attention" and shape.window is None]
    if untold and (context_length is None or window < context_length):
        raise ModelLoadError(
            f"{config.model_type} has a sliding window of {window} tokens that it does not pass to attention; "
            f"choose a context length of at most {window}"
        )


def _max_context_length(config: PretrainedConfig) -> int | None:
    length = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond this the model switches to other frequencies, for cached keys, too, which were rotated with the first ones.
        length = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None) or length
    return int(length) if length else None


def _location(model: str) -> str:
    path = Path(model).expanduser()
    return str(path) if path.exists() else model


def _sentence(error: BaseException) -> str:
    """The first line of an error, without the advice on its later lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
