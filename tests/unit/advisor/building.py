"""Settings, and a small synthetic table with a known truth."""

from __future__ import annotations

import numpy as np

from polyphase.advisor.catalog import shipped_library
from polyphase.advisor.deployment import Serving, Setting
from polyphase.advisor.precision import parse_precision

LIBRARY = shipped_library()
COLUMNS = [
    "id", "silicon_data_source", "backend", "backend_version", "model_path", "system", "precision", "mode", "isl", "osl",
    "gemm_quant_mode", "moe_quant_mode", "batch_size", "tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size",
    "prefill_batch_size", "prefill_num_workers", "prefill_tp_size", "prefill_pp_size", "prefill_attention_dp_size",
    "prefill_moe_tp_size", "prefill_moe_ep_size", "decode_batch_size", "decode_num_workers", "decode_tp_size", "decode_pp_size",
    "decode_attention_dp_size", "decode_moe_tp_size", "decode_moe_ep_size", "silicon_ttft_ms", "silicon_tpot_ms",
]  # fmt: skip


def setting(
    model: str = "llama-3.1-70b",
    accelerator: str = "h200",
    precision: str = "fp8",
    backend: str = "vllm",
    serving: Serving = Serving.AGGREGATED,
) -> Setting:
    return Setting(LIBRARY.model(model), LIBRARY.accelerator(accelerator), parse_precision(precision), backend, serving=serving)


def row(**changes: object) -> dict[str, str | None]:
    """An aggregated row of llama-3.1-70b."""
    usual = {
        "backend": "vllm", "model_path": "meta-llama/Llama-3.1-70B", "system": "h200_sxm", "precision": "fp8", "mode": "agg",
        "isl": 1024, "osl": 1024, "gemm_quant_mode": "fp8", "batch_size": 8, "tp_size": 4, "pp_size": 1,
        "silicon_ttft_ms": 200.0, "silicon_tpot_ms": 12.0,
    }  # fmt: skip
    return dict.fromkeys(COLUMNS, "") | {key: str(value) for key, value in (usual | changes).items()}


def disaggregated_row(**changes: object) -> dict[str, str | None]:
    parts = {f"{phase}_{key}": 1 for phase in ("prefill", "decode") for key in ("pp_size", "attention_dp_size", "batch_size")}
    usual = {"mode": "disagg", "batch_size": "", "tp_size": "", "prefill_tp_size": 2, "decode_tp_size": 4, "decode_batch_size": 16}
    return row(**(parts | usual | {"prefill_num_workers": 3, "decode_num_workers": 2} | changes))


def synthetic_table(seed: int = 3) -> list[dict[str, str | None]]:
    """Dense models on two accelerators; times follow a simple law with a little noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for model, parameters in (("meta-llama/Llama-3.1-70B", 70.0), ("meta-llama/Llama-3.1-8B", 8.0), ("Qwen/Qwen3-32B", 32.0)):
        for system, bandwidth in (("h100_sxm", 3.35), ("h200_sxm", 4.8)):
            for tp in (2, 4, 8):
                for batch in (1, 4, 16, 64):
                    itl = (1.4 * parameters / tp / bandwidth + 2.5 + 0.05 * batch) * float(np.exp(rng.normal(0, 0.02)))
                    ttft = (30 + 2.0 * parameters / tp + 4 * batch) * float(np.exp(rng.normal(0, 0.05)))
                    rows.append(
                        row(model_path=model, system=system, tp_size=tp, batch_size=batch, silicon_ttft_ms=ttft, silicon_tpot_ms=itl)
                    )
    return rows
