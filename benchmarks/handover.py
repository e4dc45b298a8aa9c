"""What it costs to hand a request from one worker to another: at its first token, in the middle, after a death; and to switch a role.

- One prefill and one decode worker against one worker that does both, one request at a time, the real torch engine: TTFT and the gap
  to the second token, which holds the hand-over, for prompts of 512, 2,000 and 8,000 tokens. The same without the flow, that is with all
  KV pulled when the prompt is done. All three deployments are up, and asked in turn.
- Two decode workers with streams on both: one is given another role and back; from the wish to the moment when nothing is left there that
  the role is not for, and the longest pause that a moved stream saw.
- The same two workers: one is killed (-9) while it writes; time from its death to the next token of each of its streams. What of it cannot
  be less: as soon as they go on, as many new requests with as many tokens are sent, which the same worker computes beside the same
  streams; `peer` of `migration_ms` is their TTFT, `migration_notice_ms` the time from the death until the frontend took the streams back.

Ratios are medians of ratios within a round, whose parts follow each other at once, in an order that changes: a load that comes and goes
meets all parts alike. Read those where the machine is not idle.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from harness import STDERR, Figure, StreamTimes, arguments, percentile, report, stream_completion
from polyphase.runtime import Settled, switch_role
from polyphase.testing import Deployment
from polyphase.wire.cards import Role

PROMPT_TOKENS = (512, 2000, 8000)
SAME = ("--threads", "1")  # for each worker: two of them on one machine should not be slower than one for that reason alone
SPLIT = ("--prefill", "1", "--decode", "1", "--split-threshold", "256", *SAME)
ONE = ("--workers", "1", *SAME)
PAIR = ("--prefill", "1", "--decode", "2", "--split-threshold", "256", *SAME)
STREAMS = 6
STREAM_TOKENS = 4000


def prompt_of(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(300, 1500) for _ in range(length)]


async def one_by_one(urls: dict[str, str], rounds: int) -> dict[str, dict[int, list[StreamTimes]]]:
    """Each prompt is new, so that nothing is cached."""
    times: dict[str, dict[int, list[StreamTimes]]] = {name: {length: [] for length in PROMPT_TOKENS} for name in urls}
    for turn in range(-1, rounds):  # the first warms up
        for length in PROMPT_TOKENS:
            shift = turn % len(urls)
            for place, (name, url) in enumerate([*urls.items()][shift:] + [*urls.items()][:shift]):
                async with httpx.AsyncClient(base_url=url, timeout=300) as client:
                    found = await stream_completion(client, prompt_of(length, 10_000 * turn + 10 * length + place), 8)
                if turn >= 0:
                    times[name][length].append(found)
        STDERR.print(f"round {turn + 1} of {rounds} (0 warms up)")
    return times


class Streams:
    """Streams that run for as long as they are wanted, with the arrival times of their tokens."""

    def __init__(self, url: str, count: int, seed: int) -> None:
        self.url = url
        self.times = [StreamTimes(time.perf_counter()) for _ in range(count)]
        self._seed = seed
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Streams:
        self.client = httpx.AsyncClient(base_url=self.url, timeout=300)
        self._tasks = [asyncio.create_task(self._follow(number)) for number in range(len(self.times))]
        while any(len(times.token_s) < 20 for times in self.times):  # noqa: ASYNC110  they are filled without an event
            await asyncio.sleep(0.02)
        return self

    async def _follow(self, number: int) -> None:
        await stream_completion(self.client, prompt_of(64, self._seed + number), STREAM_TOKENS, times=self.times[number])

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.client.aclose()

    async def places(self) -> list[str]:
        """The worker of each stream."""
        return [(await self.record(times))["decode_worker"] for times in self.times]

    async def record(self, times: StreamTimes) -> dict[str, Any]:
        found: dict[str, Any] = (await self.client.get(f"/debug/requests/{times.request_id}")).json()
        return found


async def switch_roles(served: Deployment, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds until nothing is misplaced, and the longest gap of each moved stream around it."""
    settled_ms: list[float] = []
    gaps_ms: list[float] = []
    async with Streams(served.url, STREAMS, seed=1) as streams:
        for turn in range(rounds):
            places = await streams.places()
            worker = max(set(places), key=places.count)
            began_s = time.perf_counter()
            async for news in switch_role(served.run_folder, worker, Role.PREFILL):
                if isinstance(news, Settled):
                    settled_ms.append(news.after_s * 1e3)
            await asyncio.sleep(0.5)
            for times, place in zip(streams.times, places, strict=True):
                if place == worker:
                    around = [at for at in times.token_s if at >= began_s - 0.2]
                    gaps_ms.append(max(b - a for a, b in itertools.pairwise(around)) * 1e3)
            async for _ in switch_role(served.run_folder, worker, Role.DECODE):
                pass
            if turn % 4 == 3:
                STDERR.print(f"role switches: {turn + 1}, the last one settled after {settled_ms[-1]:.0f} ms")
    return settled_ms, gaps_ms


@dataclass
class Migrations:
    """Milliseconds, one entry for each stream whose worker was killed."""

    notice: list[float] = field(default_factory=list)  # from the death until the frontend took it back
    gap: list[float] = field(default_factory=list)  # from the death to its next token
    floor: list[float] = field(default_factory=list)  # to the first token of a new request with as many tokens, at the same worker


async def kill_workers(served: Deployment, rounds: int) -> Migrations:
    found = Migrations()
    for turn in range(rounds):
        while sorted(served.workers()) != ["decode-0", "decode-1", "prefill-0"] or await _known_workers(served.url) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        async with Streams(served.url, STREAMS, seed=1000 * (turn + 1)) as streams:
            places = await streams.places()
            worker = max(set(places), key=places.count)
            pid = served.workers()[worker].pid
            died_s = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            moved = [times for times, place in zip(streams.times, places, strict=True) if place == worker]
            records = [await _migrated(streams, times) for times in moved]
            lengths = [next(route["tokens"] for route in reversed(record["routes"])) for record in records]
            for times, record, length in zip(moved, records, lengths, strict=True):
                found.notice.append((_taken_back_s(times, record) - died_s) * 1e3)
                first_of_successor = length - 64  # so many tokens had come before
                while len(times.token_s) <= first_of_successor:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
                found.gap.append((times.token_s[first_of_successor] - died_s) * 1e3)
            new = (
                stream_completion(streams.client, prompt_of(length, 500_000 + 7 * turn + place), 1) for place, length in enumerate(lengths)
            )
            found.floor += [times.ttft_ms for times in await asyncio.gather(*new)]
        STDERR.print(f"kills: {turn + 1}, {len(found.gap)} migrated streams, the last one after {found.gap[-1]:.0f} ms")
    return found


async def _migrated(streams: Streams, times: StreamTimes) -> dict[str, Any]:
    """Its record, as soon as that says so."""
    while not (record := await streams.record(times))["migrations"]:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return record


def _taken_back_s(times: StreamTimes, record: dict[str, Any]) -> float:
    """When the frontend took it back last, by our clock. Both saw the first token; its way here, a few ms, counts as notice."""
    at_ms = {moment["event"]: moment["at_ms"] for moment in record["timeline"]}
    since_first_token_ms: float = at_ms["broken off"] - at_ms["first token"]
    return times.token_s[0] + since_first_token_ms / 1e3


async def _known_workers(url: str) -> int:
    async with httpx.AsyncClient(base_url=url, timeout=10) as client:
        return len((await client.get("/health")).json()["models"]["demo"]["workers"])


def phases(rounds: int) -> dict[str, Figure]:
    """A split deployment against one worker."""
    figures: dict[str, Figure] = {}
    with (
        STDERR.status("split and whole"),
        Deployment("demo", *SPLIT) as split,
        Deployment("demo", *SPLIT, "--kv-flow", "off") as at_end,
        Deployment("demo", *ONE) as one,
    ):
        times = asyncio.run(one_by_one({"split": split.url, "at_end": at_end.url, "one": one.url}, rounds))
    for length in PROMPT_TOKENS:
        for figure, value_of in (("ttft", lambda t: t.ttft_ms), ("second_token_gap", lambda t: t.itl_ms[0])):
            medians = {name: percentile([value_of(t) for t in times[name][length]], 0.5) for name in times}
            figures[f"{figure}_ms_{length}"] = Figure(medians["split"], "ms", peer=medians["one"])
            figures[f"{figure}_without_flow_ms_{length}"] = Figure(medians["at_end"], "ms", peer=medians["one"])
            for name, other in (("split", "one"), ("split", "at_end")):
                pairs = zip(times[name][length], times[other][length], strict=True)
                ratio = percentile([value_of(mine) / value_of(theirs) for mine, theirs in pairs], 0.5)
                figures[f"{figure}_vs_{'one' if other == 'one' else 'without_flow'}_{length}"] = Figure(ratio, "ratio")
    return figures


def moves(switches: int, kills: int) -> dict[str, Figure]:
    """Roles switched and workers killed under streams."""
    figures: dict[str, Figure] = {}
    with STDERR.status("two decode workers"), Deployment("demo", *PAIR) as served:
        switched_ms, gaps_ms = asyncio.run(switch_roles(served, switches))
        migrated = asyncio.run(kill_workers(served, kills))
    figures["role_switch_ms"] = Figure(percentile(switched_ms, 0.5), "ms", "below 1000")
    figures["role_switch_ms_p99"] = Figure(percentile(switched_ms, 0.99), "ms", "below 1000")
    figures["role_switch_stream_gap_ms_p50"] = Figure(percentile(gaps_ms, 0.5), "ms")
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        figures[f"migration_ms_{name}"] = Figure(percentile(migrated.gap, share), "ms", peer=percentile(migrated.floor, share))
        figures[f"migration_notice_ms_{name}"] = Figure(percentile(migrated.notice, share), "ms")
    ratios = [gap / floor for gap, floor in zip(migrated.gap, migrated.floor, strict=True)]
    figures["migration_vs_new_request"] = Figure(percentile(ratios, 0.5), "ratio")
    return figures


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="requests of each length per deployment (default 5)")
    parser.add_argument("--switches", type=int, default=20, help="role switches (default 20)")
    parser.add_argument("--kills", type=int, default=8, help="workers killed (default 8)")
    parser.add_argument("--only", choices=("phases", "moves"), help="leave out the other half")
    options = parser.parse_args()
    figures: dict[str, Figure] = {}
    if options.only != "moves":
        figures |= phases(options.rounds)
    if options.only != "phases":
        figures |= moves(options.switches, options.kills)
    report("handover", figures, as_json=options.json)


if __name__ == "__main__":
    main()
