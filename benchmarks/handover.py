"""What it costs to hand a request from one worker to another: at its first token, in the middle, after a death; and to switch a role.

- One prefill and one decode worker against one worker that does both, one request at a time, the real torch engine: TTFT and the gap
  to the second token, which holds the hand-over, for prompts of 512, 2,000 and 8,000 tokens. The same without the flow, that is with all
  KV pulled when the prompt is done. All three deployments are up, and asked in turn.
- Two decode workers with streams on both: one is given another role and back; from the wish to the moment when nothing is left there that
  the role is not for, and the longest pause that a moved stream saw.
- The same two workers: one is killed (-9) while it writes; time from its death to the next token of each of its streams.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import time

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
            for place, (name, url) in enumerate(urls.items()):
                async with httpx.AsyncClient(base_url=url, timeout=300) as client:
                    found = await stream_completion(client, prompt_of(length, 10_000 * turn + 10 * length + place), 8)
                if turn >= 0:
                    times[name][length].append(found)
    return times


class Streams:
    """Streams that run for as long as they are wanted, with the arrival times of their tokens."""

    def __init__(self, url: str, count: int, seed: int) -> None:
        self.url = url
        self.times = [StreamTimes(time.perf_counter()) for _ in range(count)]
        self._seed = seed
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Streams:
        self._client = httpx.AsyncClient(base_url=self.url, timeout=300)
        self._tasks = [asyncio.create_task(self._follow(number)) for number in range(len(self.times))]
        while any(len(times.token_s) < 20 for times in self.times):  # noqa: ASYNC110  they are filled without an event
            await asyncio.sleep(0.02)
        return self

    async def _follow(self, number: int) -> None:
        await stream_completion(self._client, prompt_of(64, self._seed + number), STREAM_TOKENS, times=self.times[number])

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()

    async def places(self) -> list[str]:
        """The worker of each stream."""
        records = [(await self._client.get(f"/debug/requests/{times.request_id}")).json() for times in self.times]
        return [record["decode_worker"] for record in records]


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


async def kill_workers(served: Deployment, rounds: int) -> list[float]:
    """Milliseconds from each death to the next token of each stream that was there."""
    found: list[float] = []
    for turn in range(rounds):
        while sorted(served.workers()) != ["decode-0", "decode-1", "prefill-0"] or await _known_workers(served.url) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        async with Streams(served.url, STREAMS, seed=1000 * (turn + 1)) as streams:
            places = await streams.places()
            worker = max(set(places), key=places.count)
            pid = served.workers()[worker].pid
            died_s = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(2)
            for times, place in zip(streams.times, places, strict=True):
                if place == worker:
                    # What the dead worker had sent before still arrives for a moment; its successor's tokens come after the longest gap.
                    around = [died_s, *(at for at in times.token_s if died_s < at < died_s + 2)]
                    _, resumed_s = max(itertools.pairwise(around), key=lambda pair: pair[1] - pair[0])
                    found.append((resumed_s - died_s) * 1e3)
        STDERR.print(f"kills: {turn + 1}, {len(found)} migrated streams, the last one after {found[-1]:.0f} ms")
    return found


async def _known_workers(url: str) -> int:
    async with httpx.AsyncClient(base_url=url, timeout=10) as client:
        return len((await client.get("/health")).json()["models"]["demo"]["workers"])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="requests of each length per deployment (default 5)")
    parser.add_argument("--switches", type=int, default=20, help="role switches (default 20)")
    parser.add_argument("--kills", type=int, default=8, help="workers killed (default 8)")
    options = parser.parse_args()
    figures: dict[str, Figure] = {}
    with (
        STDERR.status("split and whole"),
        Deployment("demo", *SPLIT) as split,
        Deployment("demo", *SPLIT, "--kv-flow", "off") as at_end,
        Deployment("demo", *ONE) as one,
    ):
        times = asyncio.run(one_by_one({"split": split.url, "at_end": at_end.url, "one": one.url}, options.rounds))
    for length in PROMPT_TOKENS:
        for figure, value_of in (("ttft", lambda t: t.ttft_ms), ("second_token_gap", lambda t: t.itl_ms[0])):
            medians = {name: percentile([value_of(t) for t in times[name][length]], 0.5) for name in times}
            figures[f"{figure}_ms_{length}"] = Figure(medians["split"], "ms", peer=medians["one"])
            figures[f"{figure}_without_flow_ms_{length}"] = Figure(medians["at_end"], "ms", peer=medians["one"])
    with STDERR.status("two decode workers"), Deployment("demo", *PAIR) as served:
        switched_ms, gaps_ms = asyncio.run(switch_roles(served, options.switches))
        migrated_ms = asyncio.run(kill_workers(served, options.kills))
    figures["role_switch_ms"] = Figure(percentile(switched_ms, 0.5), "ms", "below 1000")
    figures["role_switch_ms_p99"] = Figure(percentile(switched_ms, 0.99), "ms", "below 1000")
    figures["role_switch_stream_gap_ms_p50"] = Figure(percentile(gaps_ms, 0.5), "ms")
    figures["migration_ms_p50"] = Figure(percentile(migrated_ms, 0.5), "ms")
    figures["migration_ms_p99"] = Figure(percentile(migrated_ms, 0.99), "ms")
    report("handover", figures, as_json=options.json)


if __name__ == "__main__":
    main()
