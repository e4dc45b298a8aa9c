"""From settings to processes: which workers in which roles, with which share of the cores, and the command line of each process."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from polyphase.config import ServeSettings
from polyphase.config.router import weights_text
from polyphase.launch.accelerators import Gpu, Share, find_gpus, share_gpus
from polyphase.launch.cores import core_count, thread_environment, threads_per_worker
from polyphase.launch.model_source import ModelSource, resolve_model
from polyphase.launch.process import ProcessKind, ProcessSpec
from polyphase.router.tenants import format_tenant_weights
from polyphase.wire.cards import Role

MOST_MOCK_PROCESSES = 8


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    worker_id: str
    role: Role
    share: Share | None = None  # of a GPU
    attach: str | None = None  # to this running engine server


@dataclass(frozen=True, slots=True)
class DeploymentPlan:
    settings: ServeSettings
    model: ModelSource
    workers: tuple[WorkerPlan, ...]
    threads_per_worker: int

    @property
    def url(self) -> str:
        """For clients on this machine."""
        host = self.settings.host
        if host in ("0.0.0.0", "::", ""):
            host = "127.0.0.1" if host != "::" else "::1"
        return f"http://{f'[{host}]' if ':' in host else host}:{self.settings.port}"

    def describe_workers(self) -> str:
        """`1 prefill and 2 decode workers`."""
        counts = {role: sum(worker.role is role for worker in self.workers) for role in Role}
        if counts[Role.BOTH]:
            return f"{counts[Role.BOTH]} worker{'s' if counts[Role.BOTH] > 1 else ''}"
        phases = [f"{counts[role]} {role}" for role in (Role.PREFILL, Role.DECODE) if counts[role]]
        return f"{' and '.join(phases)} worker{'s' if len(self.workers) > 1 else ''}"


def plan_deployment(settings: ServeSettings, cores: int | None = None, gpus: Sequence[Gpu] | None = None) -> DeploymentPlan:
    """`cores` and `gpus` are those of this machine unless told otherwise.

    Raises: ConfigurationError if the model is no folder and no possible name.
    """
    model = resolve_model(settings.model)
    if settings.device not in ("auto", "cuda") or settings.engine == "mock" or settings.attach:
        gpus = ()
    elif gpus is None:
        gpus = find_gpus(os.environ)
    workers = _workers(settings, gpus)
    return DeploymentPlan(
        settings=settings,
        model=ModelSource(model.location, settings.served_model_name or model.served_name),
        workers=workers,
        threads_per_worker=settings.threads or threads_per_worker(cores or core_count(), len(workers)),
    )


def _workers(settings: ServeSettings, gpus: Sequence[Gpu]) -> tuple[WorkerPlan, ...]:
    if settings.attach and not settings.decode:
        return tuple(WorkerPlan(f"worker-{number}", Role.BOTH, attach=url) for number, url in enumerate(settings.attach))
    if settings.decode:
        counts = {Role.PREFILL: settings.prefill or 0, Role.DECODE: settings.decode}
        named = [(f"{role}-{number}", role) for role, count in counts.items() for number in range(count)]
    else:
        named = [(f"worker-{number}", Role.BOTH) for number in range(settings.workers or 1)]
    if settings.attach:  # prefill workers first
        return tuple(WorkerPlan(worker_id, role, attach=url) for (worker_id, role), url in zip(named, settings.attach, strict=True))
    shares = share_gpus(gpus, len(named))
    return tuple(WorkerPlan(worker_id, role, share) for (worker_id, role), share in zip(named, shares, strict=True))


def process_specs(plan: DeploymentPlan, run_folder: Path) -> list[ProcessSpec]:
    """The frontend first, then the workers by role and name; all start at the same time.

    Many mock workers, which compute nothing, share processes, so that hundreds fit on a laptop: alone, each takes 55 MB and a third of a
    second of CPU to start, and beside others 3 MB and a fiftieth. A process is called after its first worker.
    """
    is_crowd = plan.settings.engine == "mock" and len(plan.workers) > MOST_MOCK_PROCESSES
    size = -(-len(plan.workers) // MOST_MOCK_PROCESSES) if is_crowd else 1
    groups: list[tuple[WorkerPlan, ...]] = []
    for role in Role:
        alike = [worker for worker in plan.workers if worker.role is role]
        groups += [tuple(alike[start : start + size]) for start in range(0, len(alike), size)]
    return [_frontend(plan, run_folder), *(_worker(plan, group, run_folder) for group in groups)]


def _frontend(plan: DeploymentPlan, run_folder: Path) -> ProcessSpec:
    settings = plan.settings
    flags = {
        "run-folder": run_folder,
        "host": settings.host,
        "port": settings.port,
        "policy": settings.policy,
        "router-weights": weights_text(settings.router_weights) or None,
        "router-filters": ",".join(settings.router_filters) or None,
        "router-picker": settings.router_picker,
        "router-temperature": settings.router_temperature,
        "session-idle-s": settings.session_idle,
        "split-threshold": settings.split_threshold,
        "split-fraction": settings.split_fraction,
        "kv-flow": "on" if settings.kv_flow else "off",
        "kv-events": "on" if settings.kv_events else "off",
        "predicted-lifetime-s": settings.predicted_lifetime,
        "index-capacity": settings.index_capacity,
        "drain-timeout-s": settings.drain_timeout,
        "max-queued-requests": settings.max_queued_requests,
        "max-queued-per-tenant": settings.max_queued_per_tenant,
        "max-queue-wait-s": settings.max_queue_wait,
        "tenant-weights": format_tenant_weights(settings.tenant_weights) or None,
    }
    return ProcessSpec("frontend", ProcessKind.FRONTEND, _command("polyphase.frontend", flags), _environment(1))


def _worker(plan: DeploymentPlan, group: Sequence[WorkerPlan], run_folder: Path) -> ProcessSpec:
    worker = group[0]
    settings, share = plan.settings, worker.share
    flags = {
        "run-folder": run_folder,
        "worker-id": worker.worker_id,
        "beside": ",".join(other.worker_id for other in group[1:]) or None,
        "role": worker.role,
        "engine": settings.engine,
        "model": plan.model.location,
        "name": plan.model.served_name,
        "labels": ",".join(f"{name}={value}" for name, value in settings.labels.items()) or None,
        "device": settings.device,
        "dtype": settings.dtype,
        "block-size": settings.block_size,
        "kv-bytes": settings.kv_memory or (share.kv_bytes if share else None),
        "context-length": settings.context_length,
        "max-batch-tokens": settings.max_batch_tokens,
        "max-running": settings.max_running,
        "thread-count": plan.threads_per_worker,
        "drain-timeout-s": settings.drain_timeout,
        "attach": worker.attach,
        "engine-python": settings.engine_python,
        "engine-command": settings.engine_command,
        "mock-model": settings.mock_model,
        "mock-accelerator": settings.mock_accelerator,
        "mock-speedup": settings.mock_speedup,
    }
    environment = _environment(plan.threads_per_worker)
    if share is not None:
        environment["CUDA_VISIBLE_DEVICES"] = share.gpu.index
    # One word, because the value begins with dashes itself.
    further = (f"--engine-args={settings.engine_args}",) if settings.engine_args else ()
    return ProcessSpec(worker.worker_id, ProcessKind.WORKER, (*_command("polyphase.worker", flags), *further), environment)


def _command(module: str, flags: dict[str, object]) -> tuple[str, ...]:
    """None leaves the choice to the process."""
    given = (part for flag, value in flags.items() if value is not None for part in (f"--{flag}", str(value)))
    return (sys.executable, "-m", module, *given)


def _environment(thread_count: int) -> dict[str, str]:
    return {**thread_environment(thread_count), "PYTHONUNBUFFERED": "1"}
