"""From settings to processes: which workers in which roles, with which share of the cores, and the command line of each process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from polyphase.config import GroupSettings, ServeSettings
from polyphase.config.router import weights_text
from polyphase.core.errors import ConfigurationError
from polyphase.launch.accelerators import Gpu, Share, find_gpus, share_gpus
from polyphase.launch.cores import core_count, thread_environment, threads_per_worker
from polyphase.launch.model_source import DEMO, ModelSource, resolve_model
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
class GroupPlan:
    """Workers that are alike."""

    settings: GroupSettings
    model: ModelSource
    workers: tuple[WorkerPlan, ...]

    @property
    def name(self) -> str:
        return self.settings.group or self.settings.engine


@dataclass(frozen=True, slots=True)
class DeploymentPlan:
    settings: ServeSettings
    groups: tuple[GroupPlan, ...]
    threads_per_worker: int

    @property
    def ports(self) -> range:
        """One for each frontend."""
        return range(self.settings.port, self.settings.port + self.settings.frontends)

    @property
    def model(self) -> ModelSource:
        """The first one, for examples."""
        return self.groups[0].model

    @property
    def model_names(self) -> list[str]:
        return list(dict.fromkeys(group.model.served_name for group in self.groups))

    @property
    def workers(self) -> list[WorkerPlan]:
        return [worker for group in self.groups for worker in group.workers]

    @property
    def url(self) -> str:
        """The first frontend's, for clients on this machine."""
        return self.urls[0]

    @property
    def urls(self) -> tuple[str, ...]:
        """Every frontend's, for clients on this machine."""
        host = self.settings.host
        if host in ("0.0.0.0", "::", ""):
            host = "127.0.0.1" if host != "::" else "::1"
        return tuple(f"http://{f'[{host}]' if ':' in host else host}:{port}" for port in self.ports)

    def describe_frontends(self) -> str:
        """`1 frontend`, `3 frontends at ports 8000 to 8002`."""
        count = self.settings.frontends
        return "1 frontend" if count == 1 else f"{count} frontends at ports {self.ports[0]} to {self.ports[-1]}"

    def describe_workers(self) -> str:
        """`1 prefill and 2 decode workers`."""
        counts = {role: sum(worker.role is role for worker in self.workers) for role in Role}
        if not counts[Role.PREFILL] and not counts[Role.DECODE]:
            return f"{counts[Role.BOTH]} worker{'s' if counts[Role.BOTH] > 1 else ''}"
        phases = [f"{counts[role]} {role}" for role in (Role.PREFILL, Role.DECODE) if counts[role]]
        is_plural = counts[Role.PREFILL] + counts[Role.DECODE] > 1
        others = f", and {counts[Role.BOTH]} for both" if counts[Role.BOTH] else ""
        return f"{' and '.join(phases)} worker{'s' if is_plural else ''}{others}"


def plan_deployment(
    settings: ServeSettings,
    cores: int | None = None,
    gpus: Sequence[Gpu] | None = None,
    is_taken: Callable[[str], bool] = lambda worker_id: False,
) -> DeploymentPlan:
    """`cores` and `gpus` are those of this machine unless told otherwise; `is_taken`: names that workers cannot have.

    Raises: ConfigurationError if a model is no folder and no possible name, or groups contradict each other.
    """
    groups = settings.worker_groups
    models = [_model_of(group) for group in groups]
    _check_names(groups, models)
    _check_weights(groups, models)
    names = _Names(is_taken)
    workers = [_workers(group, names) for group in groups]
    if not any(map(_wants_gpus, groups)):
        gpus = ()
    elif gpus is None:
        gpus = find_gpus(os.environ)
    wanting = [len(found) if _wants_gpus(group) else 0 for group, found in zip(groups, workers, strict=True)]
    shares = iter(share_gpus(gpus, sum(wanting)))
    planned = (
        GroupPlan(group, model, tuple(replace(worker, share=next(shares)) if _wants_gpus(group) else worker for worker in found))
        for group, model, found in zip(groups, models, workers, strict=True)
    )
    own_threads = groups[0].threads if len(groups) == 1 else None
    count = sum(map(len, workers))
    return DeploymentPlan(settings, tuple(planned), own_threads or threads_per_worker(cores or core_count(), count))


def _model_of(group: GroupSettings) -> ModelSource:
    # What an attached server calls its model may be anything, and need not be here.
    is_elsewhere = group.engine == "openai" and not Path(group.model).expanduser().is_dir() and group.model != DEMO
    model = ModelSource(group.model, group.model) if is_elsewhere else resolve_model(group.model)
    return ModelSource(model.location, group.served_model_name or model.served_name)


def _wants_gpus(group: GroupSettings) -> bool:
    return group.device in ("auto", "cuda") and group.engine != "mock" and not group.attach


def _check_names(groups: Sequence[GroupSettings], models: Sequence[ModelSource]) -> None:
    """Raises: ConfigurationError if one name would stand for two things."""
    meanings: dict[str, tuple[str, str]] = {}
    for group, model in zip(groups, models, strict=True):
        served = model.served_name
        names = [(served, "model"), *((alias, "alias") for alias in group.aliases), *((adapter, "LoRA adapter") for adapter in group.lora)]
        for name, kind in names:
            if (name, kind) == (served, "alias"):
                continue
            owner, earlier = meanings.setdefault(name, (served, kind))
            if (owner, earlier) != (served, kind):
                raise ConfigurationError(
                    f"{name!r} would be both {_as_what(earlier, owner)} and {_as_what(kind, served)}; give one of them another name"
                )


def _as_what(kind: str, model: str) -> str:
    return "the name of a model" if kind == "model" else f"{'an alias' if kind == 'alias' else f'a {kind}'} of the model {model!r}"


def _check_weights(groups: Sequence[GroupSettings], models: Sequence[ModelSource]) -> None:
    """Raises: ConfigurationError if two groups of one model and name state different weights."""
    stated: dict[tuple[str, str], float] = {}
    for group, model in zip(groups, models, strict=True):
        if group.weight is None:
            continue
        name = group.group or group.engine
        if stated.setdefault((model.served_name, name), group.weight) != group.weight:
            raise ConfigurationError(
                f"two groups {name!r} of the model {model.served_name!r} have different weights; give one another name with group = …"
            )


class _Names:
    """Hands out worker ids: a word and the next number."""

    def __init__(self, is_taken: Callable[[str], bool]) -> None:
        self._is_taken = is_taken
        self._next: dict[str, int] = {}

    def next(self, word: str) -> str:
        while True:
            number = self._next.get(word, 0)
            self._next[word] = number + 1
            if not self._is_taken(name := f"{word}-{number}"):
                return name


def _workers(settings: GroupSettings, names: _Names) -> list[WorkerPlan]:
    if settings.decode:
        counts = {Role.PREFILL: settings.prefill or 0, Role.DECODE: settings.decode}
        roles = [role for role, count in counts.items() for _ in range(count)]
        urls = settings.attach or (None,) * len(roles)  # prefill workers first
        return [WorkerPlan(names.next(role), role, attach=url) for role, url in zip(roles, urls, strict=True)]
    if settings.attach:
        return [WorkerPlan(names.next("worker"), Role.BOTH, attach=url) for url in settings.attach]
    return [WorkerPlan(names.next("worker"), Role.BOTH) for _ in range(settings.workers or 1)]


def process_specs(plan: DeploymentPlan, run_folder: Path) -> list[ProcessSpec]:
    """The frontends first, then the workers by group, role and name; all start at the same time."""
    frontends = [_frontend(plan, number, run_folder) for number in range(len(plan.ports))]
    return [*frontends, *worker_specs(plan, run_folder)]


def worker_specs(plan: DeploymentPlan, run_folder: Path) -> list[ProcessSpec]:
    """Many mock workers, which compute nothing, share processes, so that hundreds fit on a laptop: alone, each takes 55 MB and a third of a
    second of CPU to start, and beside others 3 MB and a fiftieth. A process is called after its first worker.
    """
    specs: list[ProcessSpec] = []
    for group in plan.groups:
        is_crowd = group.settings.engine == "mock" and len(group.workers) > MOST_MOCK_PROCESSES
        size = -(-len(group.workers) // MOST_MOCK_PROCESSES) if is_crowd else 1
        for role in Role:
            alike = [worker for worker in group.workers if worker.role is role]
            specs += [_worker(plan, group, alike[start : start + size], run_folder) for start in range(0, len(alike), size)]
    return specs


def _frontend(plan: DeploymentPlan, number: int, run_folder: Path) -> ProcessSpec:
    settings = plan.settings
    flags = {
        "run-folder": run_folder,
        "host": settings.host,
        "port": plan.ports[number],
        "policy": settings.policy,
        "router-weights": weights_text(settings.router_weights) or None,
        "router-filters": ",".join(settings.router_filters) or None,
        "router-picker": settings.router_picker,
        "router-temperature": settings.router_temperature,
        "session-idle-s": settings.session_idle,
        "split-threshold": settings.split_threshold,
        "split-fraction": settings.split_fraction,
        "kv-flow": "on" if settings.kv_flow else "off",
        "kv-pull": "on" if settings.kv_pull else "off",
        "kv-events": "on" if settings.kv_events else "off",
        "predicted-lifetime-s": settings.predicted_lifetime,
        "index-capacity": settings.index_capacity,
        "drain-timeout-s": settings.drain_timeout,
        "max-queued-requests": settings.max_queued_requests,
        "max-queued-per-tenant": settings.max_queued_per_tenant,
        "max-queue-wait-s": settings.max_queue_wait,
        "tenant-weights": format_tenant_weights(settings.tenant_weights) or None,
    }
    name = f"frontend-{number}" if number else "frontend"
    return ProcessSpec(name, ProcessKind.FRONTEND, _command("polyphase.frontend", flags), _environment(1))


def _worker(plan: DeploymentPlan, group: GroupPlan, workers: Sequence[WorkerPlan], run_folder: Path) -> ProcessSpec:
    worker = workers[0]
    settings, share = group.settings, worker.share
    thread_count = settings.threads or plan.threads_per_worker
    flags = {
        "run-folder": run_folder,
        "worker-id": worker.worker_id,
        "beside": ",".join(other.worker_id for other in workers[1:]) or None,
        "role": worker.role,
        "engine": settings.engine,
        "model": group.model.location,
        "name": group.model.served_name,
        "labels": _pairs(settings.labels),
        "aliases": ",".join(settings.aliases) or None,
        "lora": _pairs({name: os.path.abspath(os.path.expanduser(folder)) for name, folder in settings.lora.items()}),
        "group": group.name,
        "weight": settings.weight,
        "device": settings.device,
        "dtype": settings.dtype,
        "block-size": settings.block_size,
        "kv-bytes": settings.kv_memory or (share.kv_bytes if share else None),
        "context-length": settings.context_length,
        "max-batch-tokens": settings.max_batch_tokens,
        "max-running": settings.max_running,
        "thread-count": thread_count,
        "drain-timeout-s": plan.settings.drain_timeout,
        "attach": worker.attach,
        "engine-python": settings.engine_python,
        "engine-command": settings.engine_command,
        "engine-api-key-env": settings.engine_api_key_env,
        "mock-model": settings.mock_model,
        "mock-accelerator": settings.mock_accelerator,
        "mock-speedup": settings.mock_speedup,
    }
    environment = _environment(thread_count)
    if share is not None:
        environment["CUDA_VISIBLE_DEVICES"] = share.gpu.index
    # One word, because the value begins with dashes itself.
    further = (f"--engine-args={settings.engine_args}",) if settings.engine_args else ()
    return ProcessSpec(worker.worker_id, ProcessKind.WORKER, (*_command("polyphase.worker", flags), *further), environment)


def _pairs(pairs: Mapping[str, str]) -> str | None:
    return ",".join(f"{name}={value}" for name, value in pairs.items()) or None


def _command(module: str, flags: dict[str, object]) -> tuple[str, ...]:
    """None leaves the choice to the process."""
    given = (part for flag, value in flags.items() if value is not None for part in (f"--{flag}", str(value)))
    return (sys.executable, "-m", module, *given)


def _environment(thread_count: int) -> dict[str, str]:
    return {**thread_environment(thread_count), "PYTHONUNBUFFERED": "1"}
