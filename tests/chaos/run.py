"""One scene: a deployment, load, faults, checks. Several scenes make the long form."""

from __future__ import annotations

import asyncio
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from polyphase.testing import Deployment
from polyphase.testing.ledger import Ledger
from polyphase.testing.planting import planted_environment
from polyphase.testing.tripwires import Tripwires
from polyphase.testing.wire_faults import WireFaults
from tests.chaos import checks
from tests.chaos.cases import cases_of
from tests.chaos.disks import mount_small_disk, unmount
from tests.chaos.faults import WEIGHTS, WEIGHTS_TCP, Chaos, Means
from tests.chaos.load import Load, Tally, compare_again, fault_free


@dataclass(frozen=True)
class Scene:
    name: str
    options: tuple[str, ...]
    worker_ids: list[str]
    fault_count: int
    request_count: int
    frontends: int = 2
    over_tcp: bool = False  # each worker takes itself to be on a host of its own
    client_count: int = 8
    case_count: int = 24
    mean_interval_s: float = 0.7
    longest_s: float = 420.0
    salts: bool = True
    has_slow_tokens: bool = True  # 4,000 of one answer take far longer than any check

    @property
    def weights(self) -> dict[str, float]:
        return WEIGHTS_TCP if self.over_tcp else WEIGHTS


@dataclass
class Outcome:
    requests: int = 0
    refused: int = 0
    left: int = 0
    broken: int = 0
    ended: int = 0  # requests in the ledgers of workers
    faults: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    unavailable: set[str] = field(default_factory=set)
    effects: Counter[str] = field(default_factory=Counter)
    unfinished: list[str] = field(default_factory=list)  # scenes that came not as far as they should

    def add(self, other: Outcome) -> None:
        self.requests += other.requests
        self.refused += other.refused
        self.left += other.left
        self.broken += other.broken
        self.ended += other.ended
        self.faults += other.faults
        self.moments += other.moments
        self.violations += other.violations
        self.unavailable |= other.unavailable
        self.effects += other.effects
        self.unfinished += other.unfinished

    def summary(self) -> dict[str, object]:
        return {
            "faults": sum(self.faults.values()),
            "requests": self.requests,
            "violations": len(self.violations),
            "by_kind": dict(sorted(self.faults.items())),
            "moments": dict(sorted(self.moments.items())),
            "effects": dict(sorted(self.effects.items())),
            "ends_told_by_workers": self.ended,
            "clients_that_left": self.left,
            "connections_of_killed_frontends": self.broken,
            "refused_and_asked_again": self.refused,
            "unavailable": sorted(self.unavailable),
            "unfinished": self.unfinished,
        }


def play(scene: Scene, seed: int, *, is_verbose: bool = False) -> Outcome:
    """Raises: DeploymentFailed if it does not even start."""
    outcome = Outcome()
    plants = Path(tempfile.mkdtemp(prefix="pp-chaos-", dir="/tmp"))  # not on the disk that will be full
    ledger = Ledger(plants)
    tripwires = Tripwires(plants)
    wire_faults = WireFaults(plants) if scene.over_tcp else None
    served = Deployment("demo", *scene.options, environment=planted_environment(plants), frontends=scene.frontends)
    means = Means(tripwires, wire_faults, has_small_disk=mount_small_disk(served.home))
    try:
        served.keep_temporary_files()
        served.start()
        mapped: set[str] = set()
        try:
            asyncio.run(_play(scene, seed, served, means, outcome, is_verbose=is_verbose))
            mapped = checks.mapped_shared_memory(served)
            outcome.violations += checks.log_lines(served)
            outcome.effects += Counter(checks.effects(served))
        finally:
            logs = served.logs()
            exit_code = served.stop()
        outcome.violations += [f"{scene.name}: {line}" for line in ledger.violations()]
        outcome.ended = ledger.ended_count()
        outcome.violations += checks.nothing_left(served, exit_code, mapped)
        if outcome.violations and is_verbose:
            sys.stderr.write("\n".join([logs, *(f"VIOLATION {violation}" for violation in outcome.violations)]) + "\n")
    finally:
        if means.has_small_disk:
            unmount(served.home)
        shutil.rmtree(served.home, ignore_errors=True)
        shutil.rmtree(plants, ignore_errors=True)
    return outcome


async def _play(scene: Scene, seed: int, served: Deployment, means: Means, outcome: Outcome, *, is_verbose: bool) -> None:
    truth = await fault_free(served.url, cases_of(seed, scene.case_count))
    chaos = Chaos(served, means, seed, scene.weights, scene.mean_interval_s)
    load = Load(served.urls, truth, chaos.outages, seed, scene.client_count, salts=scene.salts)
    until_s = time.monotonic() + scene.longest_s

    def is_enough() -> bool:
        is_done = chaos.count >= scene.fault_count and load.tally.accepted >= scene.request_count
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
    outcome.requests, outcome.refused, outcome.left, outcome.broken = tally.accepted, tally.refused, tally.left, tally.broken
    outcome.faults, outcome.moments = chaos.counts, chaos.moments
    outcome.unavailable = chaos.unavailable | truth.missing
    if chaos.count < scene.fault_count or tally.accepted < scene.request_count:
        outcome.unfinished.append(
            f"{scene.name}: {chaos.count} of {scene.fault_count} faults, {tally.accepted} of {scene.request_count} requests"
        )
    wrong = [*tally.violations, *await checks.at_rest(served, scene.worker_ids)]
    if not wrong:  # otherwise nothing more can be said, and it may take long
        wrong += await checks.restore_roles(served, scene.worker_ids)
        wrong += await compare_again(served.urls[-1:], truth)
        wrong += await checks.hands_over(served, random.Random(f"{seed} at last"))
        wrong += await checks.at_rest(served, scene.worker_ids, checks.SETTLING_WITHOUT_FAULTS_S)
        if scene.has_slow_tokens:
            wrong += await checks.frees_what_a_dead_frontend_asked_for(served)
            wrong += await checks.at_rest(served, scene.worker_ids)
    outcome.violations += [f"{scene.name}: {violation}" for violation in wrong]
    if outcome.violations and is_verbose:
        sys.stderr.write("\n".join(chaos.log) + "\n")


async def _report(scene: Scene, tally: Tally, chaos: Chaos) -> None:
    while True:
        await asyncio.sleep(5)
        counts = f"{tally.answered} answers, {tally.refused} refused, {tally.broken} broken, {len(tally.violations)} violations"
        sys.stderr.write(f"{scene.name}: {chaos.count} faults, {counts}\n")
