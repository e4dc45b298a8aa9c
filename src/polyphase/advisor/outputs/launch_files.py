"""What starts a deployment: a command for each engine, and Kubernetes manifests. Flags as the engines document them (vLLM 0.10 and later,
SGLang 0.5, TensorRT-LLM 1.0); an engine's release notes overrule them.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping

from polyphase.advisor.advice import Option, Part
from polyphase.advisor.deployment import Traffic

_IMAGES = {"vllm": "vllm/vllm-openai:latest", "sglang": "lmsysorg/sglang:latest", "trtllm": "nvcr.io/nvidia/tensorrt-llm/release:latest"}
_PORT = 8000


def launch_files(option: Option, model: str, traffic: Traffic) -> dict[str, str]:
    """By file name: `serve.sh`, `kubernetes.yaml`, and for each engine a script per kind of worker, `vllm-decode.sh` for example.

    `model`: what engines load, a name on the hub or a folder.
    """
    files = {"serve.sh": _script(_polyphase(option, model, traffic), _POLYPHASE_NOTE)}
    for backend, make in _COMMANDS.items():
        for role, part in _parts(option):
            count = option.units * part.workers
            note = f"One of {count} {role or 'engine'} workers, each on {part.mapping.gpu_count} {part.setting.accelerator.name}."
            if backend != option.decode.setting.backend:
                note += f" The figures are for {option.decode.setting.backend}."
            files[f"{backend}{'-' * bool(role)}{role}.sh"] = _script(make(part, role, model, option, traffic), note)
    for role, part in _parts(option):
        files[_trtllm_options_name(role)] = _trtllm_options(part, role, option)
    files["kubernetes.yaml"] = _kubernetes(option, model, traffic)
    return files


def engine_commands(option: Option, model: str, traffic: Traffic) -> str:
    """Of the engine that the figures are for, all kinds of workers, as one text to read."""
    make = _COMMANDS[option.decode.setting.backend]
    texts = [
        f"# {option.units * part.workers} x {role or 'engine'}\n" + " \\\n  ".join(_grouped(make(part, role, model, option, traffic)))
        for role, part in _parts(option)
    ]
    return "\n\n".join(texts)


def _parts(option: Option) -> list[tuple[str, Part]]:
    return [("", option.decode)] if option.prefill is None else [("prefill", option.prefill), ("decode", option.decode)]


_POLYPHASE_NOTE = (
    "Workers and roles of the deployment. Polyphase's own torch engine computes on one accelerator a worker;\n"
    "# where the mapping spreads a worker over several, start engines with the scripts beside this one."
)


def _script(command: list[str], note: str) -> str:
    return f"#!/bin/sh\n# {note}\n" + "exec " + " \\\n  ".join(_grouped(command)) + "\n"


def _grouped(command: list[str]) -> list[str]:
    """One flag with its value on a line."""
    lines: list[str] = []
    for word in command:
        quoted = shlex.quote(word)
        if lines and (not word.startswith("-") and ((lines[-1].startswith("-") and " " not in lines[-1]) or len(lines) == 1)):
            lines[-1] += f" {quoted}"
        else:
            lines.append(quoted)
    return lines


def _polyphase(option: Option, model: str, traffic: Traffic) -> list[str]:
    roles = ["--workers", str(option.units * option.decode.workers)]
    if option.prefill:
        roles = ["--prefill", str(option.units * option.prefill.workers), "--decode", str(option.units * option.decode.workers)]
    return [
        "polyphase",
        "serve",
        model,
        *roles,
        "--max-running",
        str(option.batch * option.decode.mapping.dp),
        "--context-length",
        str(_context(traffic)),
    ]


def _context(traffic: Traffic) -> int:
    return math.ceil(traffic.whole_tokens * 1.05 / 64) * 64


def _sequences(part: Part, role: str, option: Option) -> int:
    """Requests that one data parallel rank holds at once."""
    return 8 if role == "prefill" else option.batch


def _vllm(part: Part, role: str, model: str, option: Option, traffic: Traffic) -> list[str]:
    m, precision = part.mapping, part.setting.precision
    command = ["vllm", "serve", model, "--port", str(_PORT), "--tensor-parallel-size", str(m.tp)]
    if m.pp > 1:
        command += ["--pipeline-parallel-size", str(m.pp)]
    if m.dp > 1:
        command += ["--data-parallel-size", str(m.dp)]
    if m.moe_ep > 1:
        command += ["--enable-expert-parallel"]
    command += ["--max-num-seqs", str(_sequences(part, role, option)), "--max-model-len", str(_context(traffic))]
    if precision.gemm.name == "fp8":
        command += ["--quantization", "fp8"]
    if precision.kv_bytes < 2:
        command += ["--kv-cache-dtype", "fp8"]
    if part.setting.speculation.draft_tokens:
        command += ["--speculative-config", f'{{"method": "mtp", "num_speculative_tokens": {part.setting.speculation.draft_tokens}}}']
    if role:
        kv_role = "kv_producer" if role == "prefill" else "kv_consumer"
        command += ["--kv-transfer-config", f'{{"kv_connector": "NixlConnector", "kv_role": "{kv_role}"}}']
    return command


def _sglang(part: Part, role: str, model: str, option: Option, traffic: Traffic) -> list[str]:
    m, precision = part.mapping, part.setting.precision
    world = m.tp * m.dp  # SGLang counts the data parallel groups within its tp
    command = ["python", "-m", "sglang.launch_server", "--model-path", model, "--port", str(_PORT), "--tp", str(world)]
    if m.dp > 1:
        command += ["--dp", str(m.dp), "--enable-dp-attention"]
    if m.pp > 1:
        command += ["--pp-size", str(m.pp)]
    if m.moe_ep > 1:
        command += ["--ep-size", str(m.moe_ep)]
    command += ["--max-running-requests", str(_sequences(part, role, option) * m.dp), "--context-length", str(_context(traffic))]
    if precision.gemm.name == "fp8":
        command += ["--quantization", "fp8"]
    if precision.kv_bytes < 2:
        command += ["--kv-cache-dtype", "fp8_e4m3"]
    if part.setting.speculation.draft_tokens:
        command += ["--speculative-algorithm", "NEXTN", "--speculative-num-steps", str(part.setting.speculation.draft_tokens)]
    if role:
        command += ["--disaggregation-mode", role, "--disaggregation-transfer-backend", "nixl"]
    return command


def _trtllm(part: Part, role: str, model: str, option: Option, traffic: Traffic) -> list[str]:
    m = part.mapping
    command = ["trtllm-serve", model, "--backend", "pytorch", "--port", str(_PORT), "--tp_size", str(m.tp * m.dp)]
    if m.pp > 1:
        command += ["--pp_size", str(m.pp)]
    if m.moe_ep > 1:
        command += ["--ep_size", str(m.moe_ep)]
    command += ["--max_batch_size", str(_sequences(part, role, option)), "--max_seq_len", str(_context(traffic))]
    return [*command, "--extra_llm_api_options", _trtllm_options_name(role)]


_COMMANDS = {"vllm": _vllm, "sglang": _sglang, "trtllm": _trtllm}


def _trtllm_options_name(role: str) -> str:
    return f"trtllm{'-' * bool(role)}{role}.yaml"


def _trtllm_options(part: Part, role: str, option: Option) -> str:
    lines = [
        f"enable_attention_dp: {str(part.mapping.dp > 1).lower()}",
        "kv_cache_config:",
        f"  dtype: {'fp8' if part.setting.precision.kv_bytes < 2 else 'auto'}",
        "  free_gpu_memory_fraction: 0.85",
    ]
    if role != "prefill":
        lines += ["cuda_graph_config:", "  enable_padding: true", f"  max_batch_size: {option.batch}"]
    if part.setting.speculation.draft_tokens:
        lines += ["speculative_config:", "  decoding_type: MTP", f"  num_nextn_predict_layers: {part.setting.speculation.draft_tokens}"]
    if role:
        lines += ["cache_transceiver_config:", "  backend: NIXL"]
    return "\n".join(lines) + "\n"


def _kubernetes(option: Option, model: str, traffic: Traffic) -> str:
    """One Deployment and Service for each kind of worker. A worker over several machines needs LeaderWorkerSet; a comment says so."""
    documents = [_workers(role or "engine", part, option, model, traffic) for role, part in _parts(option)]
    return "---\n".join(documents)


def _workers(name: str, part: Part, option: Option, model: str, traffic: Traffic) -> str:
    backend = part.setting.backend
    command = _COMMANDS[backend](part, name if option.prefill else "", model, option, traffic)
    if backend == "trtllm":
        command = command[:-2]  # the options file would have to be mounted
    gpus = part.mapping.gpu_count
    resource = "amd.com/gpu" if part.setting.accelerator.vendor == "AMD" else "nvidia.com/gpu"
    per_node = min(part.setting.accelerator.domain_size, 8)
    note = f"# {gpus} accelerators are more than a machine's {per_node}: run this worker as a LeaderWorkerSet\n" if gpus > per_node else ""
    labels: Mapping[str, str] = {"app": "polyphase", "role": name}
    label_lines = "\n".join(f"        {key}: {value}" for key, value in labels.items())
    arguments = "\n".join(f"            - {_yaml(word)}" for word in command)
    return (
        f"{note}apiVersion: apps/v1\nkind: Deployment\nmetadata:\n  name: {name}\nspec:\n  replicas: {option.units * part.workers}\n"
        f"  selector:\n    matchLabels:\n{label_lines.replace('        ', '      ')}\n"
        f"  template:\n    metadata:\n      labels:\n{label_lines}\n"
        f"    spec:\n      containers:\n        - name: {backend}\n          image: {_IMAGES[backend]}\n          command:\n{arguments}\n"
        f"          ports:\n            - containerPort: {_PORT}\n"
        f"          resources:\n            limits:\n              {resource}: {min(gpus, per_node)}\n"
        f"---\napiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  selector:\n    app: polyphase\n    role: {name}\n"
        f"  ports:\n    - port: {_PORT}\n      targetPort: {_PORT}\n"
    )


def _yaml(word: str) -> str:
    """Single quotes hold anything but themselves, which are doubled."""
    return "'" + word.replace("'", "''") + "'"
