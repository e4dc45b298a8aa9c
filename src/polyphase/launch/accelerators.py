"""Which GPU each worker gets. The launcher must not load torch, so it asks NVIDIA's own tool; other accelerators are left to torch."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polyphase.core.errors import ConfigurationError

_QUERY = ("nvidia-smi", "--query-gpu=index,memory.total", "--format=csv,noheader,nounits")
_QUERY_TIMEOUT_S = 10.0
_SHARED_KV_FRACTION = 0.5  # of a GPU that several workers share; the rest is for their weights and activations


@dataclass(frozen=True, slots=True)
class Gpu:
    index: str  # as CUDA_VISIBLE_DEVICES names it
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Share:
    """One worker's GPUs, or its part of one. `kv_bytes` is None for a worker that has them to itself: the engine sees what is free."""

    gpus: tuple[Gpu, ...]
    kv_bytes: int | None

    @property
    def visible(self) -> str:
        """As CUDA_VISIBLE_DEVICES says it."""
        return ",".join(gpu.index for gpu in self.gpus)


def find_gpus(environment: Mapping[str, str]) -> list[Gpu]:
    """GPUs that this process may use; none where there is no NVIDIA driver."""
    try:
        answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = parse_gpus(answer)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return gpus
    by_index = {gpu.index: gpu for gpu in gpus}
    return [by_index[index] for name in visible.split(",") if (index := name.strip()) in by_index]


def parse_gpus(answer: str) -> list[Gpu]:
    """Lines of `0, 143771` (MiB); others are passed over."""
    gpus = []
    for line in answer.splitlines():
        index, _, memory = line.partition(",")
        if index.strip().isdigit() and memory.strip().isdigit():
            gpus.append(Gpu(index.strip(), int(memory) * 1024**2))
    return gpus


def share_gpus(gpus: Sequence[Gpu], wanted: Sequence[int]) -> list[Share | None]:
    """`wanted`: by each worker, GPUs. Workers of one GPU share it where there are not enough, in turn; one of several has its own.

    None for each if there are no GPUs.
    Raises: ConfigurationError if there are not enough for workers of several.
    """
    if not gpus:
        return [None] * len(wanted)
    if sum(wanted) <= len(gpus):
        left = iter(gpus)
        return [Share(tuple(next(left) for _ in range(count)), None) for count in wanted]
    if any(count > 1 for count in wanted):
        raise ConfigurationError(
            f"the workers want {sum(wanted)} GPUs together, and this machine has {len(gpus)}; start fewer here, or lower accelerators = …"
        )
    shares: list[Share | None] = []
    for number in range(len(wanted)):
        gpu = gpus[number % len(gpus)]
        sharer_count = sum(other % len(gpus) == number % len(gpus) for other in range(len(wanted)))
        kv_bytes = None if sharer_count == 1 else int(_SHARED_KV_FRACTION * gpu.memory_bytes / sharer_count)
        shares.append(Share((gpu,), kv_bytes))
    return shares
