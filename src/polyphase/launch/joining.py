"""Further workers for a deployment that runs: a supervisor of their own, in the same run folder.

    polyphase serve A ──► run folder ◄── polyphase join B
     frontend, workers     registry       workers, which go when this ends or the deployment does

The frontends find them as they find all workers, in the registry. A worker's log reserves its name, for as long as the deployment lives.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from polyphase.config import ServeSettings
from polyphase.core.errors import ConfigurationError
from polyphase.launch.plan import DeploymentPlan, plan_deployment, worker_specs
from polyphase.launch.process import ChildProcess
from polyphase.launch.readiness import ReadinessProbe
from polyphase.launch.run_folder import LOGS, DeploymentRecord, living_deployments
from polyphase.launch.signals import signals_handled
from polyphase.launch.supervisor import News, Ready, Supervisor, Timing

CHECK_INTERVAL_S = 0.5


def plan_joining(settings: ServeSettings, record: DeploymentRecord) -> DeploymentPlan:
    """Raises: ConfigurationError."""
    logs = Path(record.run_folder) / LOGS
    return plan_deployment(settings, is_taken=lambda worker_id: not _reserve(logs / f"{worker_id}.log"))


def _reserve(log: Path) -> bool:
    """Whether the name was free. Raises: ConfigurationError if the deployment has just ended."""
    try:
        os.close(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigurationError(f"{log.parent} cannot be written to: {error.strerror}") from None
    return True


class JoinedWorkers:
    """Has what `LocalDeployment` has; a context manager, though all is given back when `run` ends."""

    def __init__(self, plan: DeploymentPlan, record: DeploymentRecord, tell: Callable[[News], None]) -> None:
        run_folder = Path(record.run_folder)
        self.plan = plan
        self.ready = asyncio.Event()
        self.has_deployment_ended = False
        self._record = record
        self._tell = tell
        self._logs = run_folder / LOGS
        self._probe = ReadinessProbe(record.urls, run_folder, [worker.worker_id for worker in plan.workers])
        settings = plan.settings
        timing = Timing(start_timeout_s=settings.start_timeout, drain_timeout_s=settings.drain_timeout)
        self._supervisor = Supervisor(worker_specs(plan, run_folder), self._logs, self._probe, self._hear, timing)

    @property
    def logs_folder(self) -> Path:
        return self._logs

    @property
    def processes(self) -> list[ChildProcess]:
        return self._supervisor.children

    def joined_worker_ids(self) -> set[str]:
        """Workers that have loaded their model."""
        return self._probe.joined_worker_ids()

    def stop(self) -> None:
        self._supervisor.stop()

    async def run(self) -> None:
        """Until a signal (or `stop`), or the deployment ends; then the workers drain, and have ended.

        Raises: StartFailed.
        Cancel: everything is killed.
        """
        async with self._probe:
            with signals_handled(self._supervisor):
                watch = asyncio.create_task(self._stop_with_deployment(os.environ), name="deployment")
                try:
                    await self._supervisor.run()
                finally:
                    watch.cancel()

    async def _stop_with_deployment(self, environment: Mapping[str, str]) -> None:
        """Without a frontend nobody would ask them anything, and the next deployment of this name clears the folder."""
        while self._has_deployment(environment):  # noqa: ASYNC110  there is no event for it
            await asyncio.sleep(CHECK_INTERVAL_S)
        self.has_deployment_ended = True
        self._supervisor.stop()

    def _has_deployment(self, environment: Mapping[str, str]) -> bool:
        return any((record.name, record.pid) == (self._record.name, self._record.pid) for record in living_deployments(environment))

    def _hear(self, news: News) -> None:
        if isinstance(news, Ready):
            self.ready.set()
        self._tell(news)

    def __enter__(self) -> JoinedWorkers:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Nothing is left to do: names stay reserved, and logs stay for whoever asks what happened."""
