"""A whole deployment on this machine: port, run folder, processes, signals, and the clearing away afterwards."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

from polyphase.launch.plan import DeploymentPlan, process_specs
from polyphase.launch.ports import check_port
from polyphase.launch.process import ChildProcess
from polyphase.launch.readiness import ReadinessProbe
from polyphase.launch.run_folder import DeploymentRecord, RunFolder
from polyphase.launch.signals import signals_handled
from polyphase.launch.supervisor import News, Ready, StartFailed, Supervisor, Timing


class LocalDeployment:
    """Claims its run folder at once, so that what is wrong is said before anything starts; a context manager that gives it back.

    Raises: ConfigurationError if the port or the name is taken.
    """

    def __init__(self, plan: DeploymentPlan, tell: Callable[[News], None]) -> None:
        settings = plan.settings
        for port in plan.ports:
            check_port(settings.host, port)
        self.plan = plan
        self.ready = asyncio.Event()
        self._tell = tell
        self._folder = RunFolder.claim(settings.name, os.environ)
        self._probe = ReadinessProbe(plan.urls, self._folder.path, [worker.worker_id for worker in plan.workers])
        self._supervisor = Supervisor(
            process_specs(plan, self._folder.path),
            self._folder.logs,
            self._probe,
            self._hear,
            Timing(start_timeout_s=settings.start_timeout, drain_timeout_s=settings.drain_timeout),
        )
        self._keeps_logs = False

    @property
    def run_folder(self) -> Path:
        return self._folder.path

    @property
    def logs_folder(self) -> Path:
        return self._folder.logs

    @property
    def processes(self) -> list[ChildProcess]:
        return self._supervisor.children

    def joined_worker_ids(self) -> set[str]:
        """Workers that have loaded their model."""
        return self._probe.joined_worker_ids()

    def stop(self) -> None:
        self._supervisor.stop()

    async def run(self) -> None:
        """Until SIGTERM or SIGINT (or `stop`) and everything has ended; a second signal kills.

        Raises: StartFailed; the logs are then kept.
        Cancel: everything is killed.
        """
        self._folder.publish(self._record())
        async with self._probe:
            try:
                with signals_handled(self._supervisor):
                    await self._supervisor.run()
            except StartFailed:
                self._keeps_logs = True
                raise

    def _hear(self, news: News) -> None:
        if isinstance(news, Ready):
            self.ready.set()
        self._tell(news)

    def _record(self) -> DeploymentRecord:
        return DeploymentRecord(
            name=self.plan.settings.name,
            model=", ".join(self.plan.model_names),
            url=self.plan.url,
            further_urls=list(self.plan.urls[1:]),
            pid=os.getpid(),
            run_folder=str(self._folder.path),
            worker_ids=[worker.worker_id for worker in self.plan.workers],
            started_unix_s=time.time(),
        )

    def __enter__(self) -> LocalDeployment:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._folder.release(keep_logs=self._keeps_logs)
