"""How many cores this machine lets us use, and each process's share of them."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")


def core_count(cgroup_limit: Path = _CGROUP_LIMIT) -> int:
    """Cores that this process may run on: its affinity, cut to the limit of its container if there is one."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    try:
        quota, period = cgroup_limit.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no such limit
    return cores


def threads_per_worker(cores: int, worker_count: int) -> int:
    return max(1, cores // worker_count)


def thread_environment(thread_count: int) -> dict[str, str]:
    """For numeric libraries, which would otherwise each take every core in every process."""
    count = str(thread_count)
    libraries = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), count)
    return {**libraries, "TOKENIZERS_PARALLELISM": "false"}
