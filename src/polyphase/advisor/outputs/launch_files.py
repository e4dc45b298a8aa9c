"""What starts a deployment: a configuration of Polyphase, a command for each engine, and Kubernetes manifests. Flags as the engines
document them (vLLM 0.10 and later, SGLang 0.5, TensorRT-LLM 1.0); an engine's release notes overrule them.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import replace

from polyphase.advisor.advice import Option, Part
from polyphase.advisor.deployment import Traffic

_IMAGES = {"vllm": "vllm/vllm-openai:latest", "sglang": "lmsysorg/sglang:latest", "trtllm": "nvcr.io/nvidia/tensorrt-llm/release:latest"}
_PORT = 8000


def launch_files(option: Option, model: str, traffic: Traffic) -> dict[str, str]:
    """By file name: `polyphase.toml` and `serve.sh`, `kubernetes.yaml`, and for each engine a script per kind of worker, such as
    `vllm-decode.sh`.

    `model`: what engines load, a name on the hub or a folder.
    """
    files = {"polyphase.toml": _polyphase(option, model, traffic), "serve.sh": _SERVE}
    for backend, make in _COMMANDS.items():
        for role, part in _parts(option):
            count = option.units * part.workers
            note = f"One of {count} {role or 'engine'} workers, each on {part.mapping.gpu_count} {part.setting.accelerator.name}."
            if (checkpoint := _checkpoint_note(replace(part, setting=replace(part.setting, backend=backend)))) != "":
                note += f" The model is {checkpoint}."
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


_SERVE = """#!/bin/sh
# engine_python in the file names the interpreter of the engine's environment. All workers start on this machine: on several, lower the
# counts in the file, and attach to the engines that run elsewhere, which the other scripts start.
cd "$(dirname "$0")" || exit
exec polyphase serve --config polyphase.toml "$@"
"""


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


def _polyphase(option: Option, model: str, traffic: Traffic) -> str:
    """A group of workers for each kind of engine; one name, so that prompts are handed over between them."""
    lines = [
        f"# {option.layout} of {option.decode.setting.accelerator.name}, batch {option.batch}",
        f"context_length = {_context(traffic)}",
        "",
    ]
    for role, part in _parts(option):
        backend = part.setting.backend
        arguments = shlex.join(_SHAPES[backend](part, role))
        note = _checkpoint_note(part)
        lines += [
            "[[groups]]",
            f"model = {_toml(model)}{f'  # {note}' if note else ''}",
            f"group = {_toml(backend)}",
            f"engine = {_toml(backend)}",
            f"{role or 'workers'} = {option.units * part.workers}",
            f"accelerators = {part.mapping.gpu_count}  # each",
            f"max_running = {_sequences(part, role, option) * (part.mapping.dp if backend == 'sglang' else 1)}",
            *([f"engine_args = {_toml(arguments)}"] if arguments else []),
            "",
        ]
    return "\n".join(lines)


def _checkpoint_note(part: Part) -> str:
    """Of a precision that the engine does not make of the published weights while it loads them."""
    wanted, published = part.setting.precision.name, part.setting.shape.native_precision
    is_made_at_loading = part.setting.precision.gemm.name == "fp8" and part.setting.backend in ("vllm", "sglang")
    if wanted == published or is_made_at_loading:
        return ""
    return f"published in {published}: put the name of a checkpoint in {wanted} here"


def _toml(text: str) -> str:
    """A basic string, whose escapes are JSON's."""
    return json.dumps(text, ensure_ascii=False)


def _context(traffic: Traffic) -> int:
    return math.ceil(traffic.whole_tokens * 1.05 / 64) * 64


def _sequences(part: Part, role: str, option: Option) -> int:
    """Requests that one data parallel rank holds at once."""
    return 8 if role == "prefill" else option.batch


def _vllm(part: Part, role: str, model: str, option: Option, traffic: Traffic) -> list[str]:
    command = ["vllm", "serve", model, "--port", str(_PORT), *_vllm_shape(part, role)]
    command += ["--max-num-seqs", str(_sequences(part, role, option)), "--max-model-len", str(_context(traffic))]
    if role:
        kv_role = "kv_producer" if role == "prefill" else "kv_consumer"
        command += ["--kv-transfer-config", f'{{"kv_connector": "NixlConnector", "kv_role": "{kv_role}"}}']
    return command


def _vllm_shape(part: Part, role: str) -> list[str]:
    m, precision = part.mapping, part.setting.precision
    flags = ["--tensor-parallel-size", str(m.tp)]
    if m.pp > 1:
        flags += ["--pipeline-parallel-size", str(m.pp)]
    if m.dp > 1:
        flags += ["--data-parallel-size", str(m.dp)]
    if m.moe_ep > 1:
        flags += ["--enable-expert-parallel"]
    if precision.gemm.name == "fp8":
        flags += ["--quantization", "fp8"]
    if precision.kv_bytes < 2:
        flags += ["--kv-cache-dtype", "fp8"]
    if part.setting.speculation.draft_tokens:
        flags += ["--speculative-config", f'{{"method": "mtp", "num_speculative_tokens": {part.setting.speculation.draft_tokens}}}']
    return flags


def _sglang(part: Part, role: str, model: str, option: Option, traffic: Traffic) -> list[str]:
    command = ["python", "-m", "sglang.launch_server", "--model-path", model, "--port", str(_PORT), *_sglang_shape(part, role)]
    command += ["--max-running-requests", str(_sequences(part, role, option) * part.mapping.dp), "--context-length", str(_context(traffic))]
    if role:
        command += ["--disaggregation-mode", role, "--disaggregation-transfer-backend", "nixl"]
    return command


def _sglang_shape(part: Part, role: str) -> list[str]:
    m, precision = part.mapping, part.setting.precision
    flags = ["--tp", str(m.tp * m.dp)]  # SGLang counts the data parallel groups within its tp
    if m.dp > 1:
        flags += ["--dp", str(m.dp), "--enable-dp-attention"]
    if m.pp > 1:
        flags += ["--pp-size", str(m.pp)]
    if m.moe_ep > 1:
        flags += ["--ep-size", str(m.moe_ep)]
    if precision.gemm.name == "fp8":
        flags += ["--quantization", "fp8"]
    if precision.kv_bytes < 2:
        flags += ["--kv-cache-dtype", "fp8_e4m3"]
    if part.setting.speculation.draft_tokens:
        flags += ["--speculative-algorithm", "NEXTN", "--speculative-num-steps", str(part.setting.speculation.draft_tokens)]
    return flags


def _trtllm(part: Part, role: str, model: str, option: Option, traffic: Traffic) -> list[str]:
    command = ["trtllm-serve", model, "--backend", "pytorch", "--port", str(_PORT)]
    sizes = ["--max_batch_size", str(_sequences(part, role, option)), "--max_seq_len", str(_context(traffic))]
    return [*command, *sizes, *_trtllm_shape(part, role)]


def _trtllm_shape(part: Part, role: str) -> list[str]:
    m = part.mapping
    flags = ["--tp_size", str(m.tp * m.dp)]
    if m.pp > 1:
        flags += ["--pp_size", str(m.pp)]
    if m.moe_ep > 1:
        flags += ["--ep_size", str(m.moe_ep)]
    return [*flags, "--extra_llm_api_options", _trtllm_options_name(role)]


_SHAPES = {"vllm": _vllm_shape, "sglang": _sglang_shape, "trtllm": _trtllm_shape}
_COMMANDS = {"vllm": _vllm, "sglang": _sglang, "trtllm": _trtllm}


def _trtllm_options_name(role: str) -> str:
    return f"trtllm{'-' * bool(role)}{role}.yaml"


def _trtllm_options(part: Part, role: str, option: Option) -> str:
    lines = [
        f"enable_attention_dp: {str(part.mapping.dp > 1).lower()}",
        "enable_iter_perf_stats: true  # Polyphase reads its load there",
        "kv_cache_config:",
        "  event_buffer_max_size: 65536  # and here what it has cached",
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
