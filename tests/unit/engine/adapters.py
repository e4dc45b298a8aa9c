"""LoRA adapters in PEFT's files, with random weights, and the models that they amount to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.unit.engine.tiny import Peer

ATTENTION = ("self_attn.q_proj", "self_attn.v_proj")
ALL = (*ATTENTION, "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def save_adapter(folder: Path, model_folder: str, seed: int, modules: tuple[str, ...] = ALL, rank: int = 4, **config: Any) -> str:
    """Of a strength that changes what is said."""
    generator = torch.Generator().manual_seed(seed)
    model = Peer(model_folder).model
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(modules):
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn((rank, module.in_features), generator=generator) * 0.2
            tensors[f"{key}.lora_B.weight"] = torch.randn((module.out_features, rank), generator=generator) * 0.2
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(modules), "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return str(folder)


def merged_peer(model_folder: str, adapter_folder: str, scale: float = 2.0) -> Peer:
    """transformers, with W + s B A in place of W."""
    from safetensors.torch import load_file

    peer = Peer(model_folder)
    tensors = load_file(Path(adapter_folder) / "adapter_model.safetensors")
    with torch.no_grad():
        for key, up in tensors.items():
            if key.endswith(".lora_B.weight"):
                layer = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
                down = tensors[key.replace(".lora_B.", ".lora_A.")]
                linear: Any = peer.model.get_submodule(layer)
                linear.weight += scale * up @ down
    return peer
