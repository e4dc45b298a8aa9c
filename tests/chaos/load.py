"""Clients that ask all the time, and hold every answer against that of the fault-free run."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import httpx

from tests.chaos.cases import Answer, Case, ask, difference, difference_so_far, with_stop_string
from tests.chaos.outages import Outages

# Not accepted: the client is told to come again, and does.
REFUSALS = {"no_workers", "overloaded", "draining", "queue_full"}
TIMEOUT_S = 120.0
STOP_CASES = 4
NEVER_S = 1e9  # httpcore closes an idle connection that has expired even when it has just been given to a request


@dataclass
class Tally:
    """What the clients saw."""

    answered: int = 0
    refused: int = 0
    left: int = 0  # clients that went away by themselves
    broken: int = 0  # whose frontend was killed
    violations: list[str] = field(default_factory=list)

    @property
    def accepted(self) -> int:
        return self.answered + self.left


@dataclass
class Truth:
    """Cases, and the answers to them without any fault."""

    cases: list[Case] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)  # that this deployment cannot do

    def __iter__(self) -> Iterator[tuple[Case, Answer]]:
        return iter(zip(self.cases, self.answers, strict=True))


async def fault_free(url: str, cases: Sequence[Case]) -> Truth:
    """Each case asked as a stream and as a whole: both must agree, and are the truth from then on."""
    truth = Truth()
    waiting = list(cases)
    stop_count = 0
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
        while waiting:
            case = waiting.pop(0)
            whole, streamed = Answer(), Answer()
            status = await ask(client, case, whole, stream=False)
            if status == 400 and case.needs:
                truth.missing.add(case.needs)
                continue
            assert status == 200, whole
            assert await ask(client, case, streamed, stream=True) == 200, streamed
            found = difference(whole, streamed, case)
            assert found is None, f"without any fault, stream and whole answer differ in case {case.name}: {found}"
            truth.cases.append(case)
            truth.answers.append(whole)
            if stop_count < STOP_CASES and (ended := with_stop_string(case, whole)) is not None and "stop" not in case.body:
                waiting.append(ended)
                stop_count += 1
    return truth


async def compare_again(urls: Sequence[str], truth: Truth) -> list[str]:
    """When all faults are over, everything must still be as it was without them. Returns: what is not; one case is enough."""
    for url in urls:
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
            for case, expected in truth:
                answer = Answer()
                try:
                    status = await ask(client, case, answer, stream=True)
                except httpx.HTTPError as error:
                    return [f"after all faults, case {case.name} at {url}: {error!r}"]
                wrong = difference(expected, answer, case) if status == 200 else f"status {status}: {answer.errors}"
                if wrong is not None:
                    return [f"after all faults, case {case.name} at {url}: {wrong}"]
    return []


class Load:
    """`client_count` clients until told to stop; each request is random but for its case."""

    def __init__(self, urls: Sequence[str], truth: Truth, outages: Outages, seed: int, client_count: int, *, salts: bool) -> None:
        """`salts`: some requests carry a salt of their own, which a model's tokens do not depend on."""
        self._salts = salts
        self._urls = urls
        self._truth = truth
        self._outages = outages
        self._seed = seed
        self._client_count = client_count
        self._is_stopping = False
        self.tally = Tally()

    def stop(self) -> None:
        """No further requests; those that run are finished."""
        self._is_stopping = True

    async def run(self) -> None:
        limits = httpx.Limits(
            max_connections=4 * self._client_count, max_keepalive_connections=self._client_count, keepalive_expiry=NEVER_S
        )
        async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits) as client, asyncio.TaskGroup() as tasks:
            for number in range(self._client_count):
                tasks.create_task(self._ask_again_and_again(client, random.Random(f"{self._seed}-{number}")))

    async def _ask_again_and_again(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        while not self._is_stopping:
            place = rng.randrange(len(self._truth.cases))
            leave_after = rng.randrange(1, 10) if rng.random() < 0.03 else None
            await self._ask(client, place, stream=rng.random() < 0.7, leave_after=leave_after, rng=rng)

    async def _ask(self, client: httpx.AsyncClient, place: int, *, stream: bool, leave_after: int | None, rng: random.Random) -> None:
        case, expected, tally = self._truth.cases[place], self._truth.answers[place], self.tally
        url = rng.choice([url for url in self._urls if not self._outages.is_out(url)] or self._urls)
        asked = replace(case, path=f"{url}{case.path}")
        if self._salts and rng.random() < 0.6:  # nothing of it is cached anywhere, so that it is computed, split and moved again
            asked = replace(asked, body={**case.body, "cache_salt": f"{rng.getrandbits(64):x}"})
        answer = Answer()
        began_s = time.monotonic()
        status = 200
        found: str | None
        try:
            status = await ask(client, asked, answer, stream=stream, leave_after=leave_after if stream else None)
        except (httpx.HTTPError, ValueError) as error:
            if self._outages.touch(url, began_s):
                tally.broken += 1
                found = difference_so_far(expected, answer)
            else:
                waited_s = time.monotonic() - began_s
                found = f"no terminal message: {error!r} after {waited_s:.1f} s, because of {error.__cause__!r}"
            self._judge(asked, answer, found, stream=stream)
            await asyncio.sleep(0.1 + 0.3 * rng.random())
            return
        if status != 200 and answer.errors and answer.errors[0].get("code") in REFUSALS:
            tally.refused += 1
            await asyncio.sleep(0.1 + 0.3 * rng.random())
            return
        if stream and leave_after is not None and status == 200 and not answer.done_count:
            tally.left += 1
            found = difference_so_far(expected, answer)
        else:
            tally.answered += 1
            found = difference(expected, answer, case) if status == 200 else f"status {status}: {answer.errors}"
        self._judge(asked, answer, found, stream=stream)

    def _judge(self, asked: Case, answer: Answer, found: str | None, *, stream: bool) -> None:
        if found is not None:
            how = "stream" if stream else "whole"
            self.tally.violations.append(f"case {asked.name} ({how}, {asked.path}, request {answer.request_id}): {found}")
