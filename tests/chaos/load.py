"""Clients that ask all the time, and hold every answer against that of the fault-free run."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field, replace

import httpx

from tests.chaos.cases import Answer, Case, ask, difference

# Not accepted: the client is told to come again, and does.
REFUSALS = {"no_workers", "overloaded", "draining", "queue_full"}
TIMEOUT_S = 120.0


@dataclass
class Tally:
    """What the clients saw."""

    answered: int = 0
    refused: int = 0
    left: int = 0  # clients that went away by themselves
    violations: list[str] = field(default_factory=list)
    by_case: Counter[str] = field(default_factory=Counter)


async def fault_free(url: str, cases: list[Case]) -> list[Answer]:
    """Each case asked as a stream and as a whole: both must agree, and are the truth from then on."""
    answers = []
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
        for case in cases:
            status, whole = await ask(client, case, stream=False)
            assert status == 200, whole
            status, streamed = await ask(client, case, stream=True)
            assert status == 200, streamed
            found = difference(whole, streamed, case)
            assert found is None, f"without any fault, stream and whole answer differ in case {case.name}: {found}"
            answers.append(whole)
    return answers


class Load:
    """`client_count` clients until told to stop; each request is random but for its case."""

    def __init__(self, url: str, cases: list[Case], truth: list[Answer], seed: int, client_count: int, *, salts: bool) -> None:
        """`salts`: some requests carry a salt of their own, which a model's tokens do not depend on."""
        self._salts = salts
        self._url = url
        self._cases = cases
        self._truth = truth
        self._seed = seed
        self._client_count = client_count
        self._is_stopping = False
        self.tally = Tally()

    def stop(self) -> None:
        """No further requests; those that run are finished."""
        self._is_stopping = True

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=4 * self._client_count, max_keepalive_connections=self._client_count)
        async with httpx.AsyncClient(base_url=self._url, timeout=TIMEOUT_S, limits=limits) as client, asyncio.TaskGroup() as tasks:
            for number in range(self._client_count):
                tasks.create_task(self._ask_again_and_again(client, random.Random(f"{self._seed}-{number}")))

    async def _ask_again_and_again(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        while not self._is_stopping:
            place = rng.randrange(len(self._cases))
            leave_after = rng.randrange(1, 10) if rng.random() < 0.03 else None
            await self._ask(client, place, stream=rng.random() < 0.7, leave_after=leave_after, rng=rng)

    async def _ask(self, client: httpx.AsyncClient, place: int, *, stream: bool, leave_after: int | None, rng: random.Random) -> None:
        case, tally = self._cases[place], self.tally
        if self._salts and rng.random() < 0.6:  # nothing of it is cached anywhere, so that it is computed, split and moved again
            case = replace(case, body={**case.body, "cache_salt": f"{rng.getrandbits(64):x}"})
        try:
            status, answer = await ask(client, case, stream=stream, leave_after=leave_after if stream else None)
        except (httpx.HTTPError, ValueError) as error:
            tally.violations.append(f"case {case.name}: no terminal message: {type(error).__name__}: {error}")
            return
        if status != 200 and answer.errors and answer.errors[0].get("code") in REFUSALS:
            tally.refused += 1
            await asyncio.sleep(0.1 + 0.3 * rng.random())
            return
        if stream and leave_after is not None and status == 200 and not answer.done_count:
            tally.left += 1
            return
        found = difference(self._truth[place], answer, case) if status == 200 else f"status {status}: {answer.errors}"
        if found is not None:
            how = "stream" if stream else "whole"
            tally.violations.append(f"case {case.name} ({how}, {case.path}, request {answer.request_id}): {found}")
        tally.answered += 1
        tally.by_case[case.name] += 1
