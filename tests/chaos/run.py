"""One scene: a deployment, load, faults, checks. Several scenes make the long form."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from polyphase.testing import Deployment
from tests.chaos import checks
from tests.chaos.cases import cases_of
from tests.chaos.faults import WEIGHTS, Chaos, mount_small_disk, unmount
from tests.chaos.load import Load, Tally, fault_free


@dataclass(frozen=True)
class Scene:
    name: str
    options: tuple[str, ...]
    worker_ids: list[str]
    fault_count: int
    request_count: int
    client_count: int = 8
    mean_interval_s: float = 0.7
    longest_s: float = 1200.0
    salts: bool = True
    weights: dict[str, float] = field(default_factory=lambda: dict(WEIGHTS))


@dataclass
class Outcome:
    requests: int = 0
    refused: int = 0
    left: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    unavailable: set[str] = field(default_factory=set)
    effects: Counter[str] = field(default_factory=Counter)

    def add(self, other: Outcome) -> None:
        self.requests += other.requests
        self.refused += other.refused
        self.left += other.left
        self.faults += other.faults
        self.violations += other.violations
        self.unavailable |= other.unavailable
        self.effects += other.effects

    def summary(self) -> dict[str, object]:
        return {
            "faults": sum(self.faults.values()),
            "requests": self.requests,
            "violations": len(self.violations),
            "by_kind": dict(sorted(self.faults.items())),
            "effects": dict(sorted(self.effects.items())),
            "clients_that_left": self.left,
            "refused_and_asked_again": self.refused,
            "unavailable": sorted(self.unavailable),
        }


def play(scene: Scene, seed: int, *, is_verbose: bool = False) -> Outcome:
    """Raises: DeploymentFailed if it does not even start."""
    outcome = Outcome()
    shared_before = checks.shared_memory()
    served = Deployment("demo", *scene.options)
    has_small_disk = mount_small_disk(served.home)
    try:
        served.start()
        try:
            asyncio.run(_play(scene, seed, served, outcome, has_small_disk=has_small_disk, is_verbose=is_verbose))
            outcome.violations += checks.log_lines(served)
            outcome.effects += Counter(checks.effects(served))
            logs = served.logs()
        finally:
            exit_code = served.stop()
        outcome.violations += checks.nothing_left(served, exit_code, shared_before)
        if outcome.violations and is_verbose:
            sys.stderr.write("\n".join([logs, *(f"VIOLATION {violation}" for violation in outcome.violations)]) + "\n")
    finally:
        if has_small_disk:
            unmount(served.home)
        shutil.rmtree(served.home, ignore_errors=True)
    return outcome


async def _play(scene: Scene, seed: int, served: Deployment, outcome: Outcome, *, has_small_disk: bool, is_verbose: bool) -> None:
    cases = cases_of(seed)
    truth = await fault_free(served.url, cases)
    load = Load(served.url, cases, truth, seed, scene.client_count, salts=scene.salts)
    chaos = Chaos(served, seed, scene.weights, scene.mean_interval_s, has_small_disk=has_small_disk)
    until_s = time.monotonic() + scene.longest_s

    def is_enough() -> bool:
        tally = load.tally
        is_done = chaos.count >= scene.fault_count and tally.answered + tally.left >= scene.request_count
        return is_done or time.monotonic() > until_s

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(load.run())
        if is_verbose:
            reporter = tasks.create_task(_report(scene, load.tally, chaos))
        try:
            await chaos.run(is_enough)
            await chaos.heal()
        finally:
            load.stop()
            if is_verbose:
                reporter.cancel()
    tally = load.tally
    outcome.requests, outcome.refused, outcome.left = tally.answered + tally.left, tally.refused, tally.left
    outcome.faults = chaos.counts
    outcome.unavailable = chaos.unavailable
    outcome.violations += [f"{scene.name}: {violation}" for violation in tally.violations]
    outcome.violations += [f"{scene.name}: {violation}" for violation in await checks.at_rest(served, scene.worker_ids)]
    if outcome.violations and is_verbose:
        sys.stderr.write("\n".join(chaos.log) + "\n")


async def _report(scene: Scene, tally: Tally, chaos: Chaos) -> None:
    while True:
        await asyncio.sleep(5)
        counts = f"{tally.answered} answers, {tally.refused} refused, {len(tally.violations)} violations"
        sys.stderr.write(f"{scene.name}: {chaos.count} faults, {counts}\n")
