"""What it is worth that KV is pulled from a worker that has it, not computed again: torch engine, prompts of 512, 2,000 and 8,000 tokens.

- Two workers that take turns: TTFT of a prompt that the other one has just computed, pulled against computed.
- Three workers that take turns: one computes a prompt, a second one streams an answer to it and is killed (-9); time from its death to the
  next token, at the third. Pulled from the first against computed.

Peer figures are those with `--kv-pull off`. The ratios are computed / pulled: above 1, pulling is faster.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from dataclasses import dataclass, field

import httpx

from handover import PROMPT_TOKENS, prompt_of
from harness import STDERR, Figure, StreamTimes, arguments, percentile, report, stream_completion
from polyphase.testing import Deployment

TURNS = ("--policy", "round-robin", "--threads", "1")
DIES_AFTER, STREAM_TOKENS = 20, 100


@dataclass(slots=True)
class Found:
    """Milliseconds by prompt length, and the part of the prompt that was pulled."""

    ms: dict[int, list[float]] = field(default_factory=lambda: {length: [] for length in PROMPT_TOKENS})
    pulled: list[float] = field(default_factory=list)

    def median(self, length: int) -> float:
        return percentile(self.ms[length], 0.5)


async def second_answers(served: Deployment, rounds: int) -> Found:
    """TTFT where the other worker holds the prompt."""
    found = Found()
    async with httpx.AsyncClient(base_url=served.url, timeout=300) as client:
        for turn, length in itertools.product(range(-1, rounds), PROMPT_TOKENS):  # the first turn warms up
            prompt = prompt_of(length, 100 * turn + length)
            first = await stream_completion(client, prompt, 4)
            second = await stream_completion(client, prompt, 4)
            if first.token_ids != second.token_ids:
                raise RuntimeError(f"other tokens: {first.token_ids} and {second.token_ids}")
            if turn >= 0:
                found.ms[length].append(second.ttft_ms)
                found.pulled.append(await _pulled_part(client, second.request_id))
    return found


async def deaths(served: Deployment, rounds: int) -> Found:
    """From a death to the stream's next token, where a third worker holds the prompt."""
    found = Found()
    async with httpx.AsyncClient(base_url=served.url, timeout=300) as client:
        for turn, length in itertools.product(range(rounds), PROMPT_TOKENS):
            while len(served.workers()) < 3 or await _known_workers(client) < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            prompt = prompt_of(length, 7 + 100 * turn + length)
            whole = await stream_completion(client, prompt, STREAM_TOKENS)
            times = StreamTimes(time.perf_counter())
            stream = asyncio.create_task(stream_completion(client, prompt, STREAM_TOKENS, times=times))
            while len(times.token_s) < DIES_AFTER:  # noqa: ASYNC110  filled without an event
                await asyncio.sleep(0.005)
            worker = (await client.get(f"/debug/requests/{times.request_id}")).json()["decode_worker"]
            pid = served.workers()[worker].pid  # looking it up takes a while
            died_s = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            await stream
            if times.token_ids != whole.token_ids:
                raise RuntimeError("other tokens after the death")
            # What the dead worker had sent before still arrives for a moment; its successor's tokens come after the longest gap.
            around = [died_s, *(at for at in times.token_s if at > died_s)]
            _, resumed_s = max(itertools.pairwise(around), key=lambda pair: pair[1] - pair[0])
            found.ms[length].append((resumed_s - died_s) * 1e3)
            found.pulled.append(await _pulled_part(client, times.request_id))
            STDERR.print(f"{length} tokens: {found.ms[length][-1]:.0f} ms after the death, {100 * found.pulled[-1]:.0f} % of it pulled")
    return found


async def _pulled_part(client: httpx.AsyncClient, request_id: str) -> float:
    """Of the tokens known at the last route."""
    route = (await client.get(f"/debug/requests/{request_id}")).json()["routes"][-1]
    return float(route["legs"][0]["transferred_tokens"] / route["tokens"])


async def _known_workers(client: httpx.AsyncClient) -> int:
    models = (await client.get("/health")).json().get("models", {})
    return len(models.get("demo", {}).get("workers", {}))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="prompts of each length (default 5)")
    parser.add_argument("--kills", type=int, default=3, help="workers killed for each length (default 3)")
    options = parser.parse_args()
    ttft: dict[str, Found] = {}
    gaps: dict[str, Found] = {}
    for switch in ("on", "off"):
        with Deployment("demo", "--workers", "2", *TURNS, "--kv-pull", switch) as served:
            ttft[switch] = asyncio.run(second_answers(served, options.rounds))
        with Deployment("demo", "--workers", "3", *TURNS, "--kv-pull", switch) as served:
            gaps[switch] = asyncio.run(deaths(served, options.kills))
    figures: dict[str, Figure] = {}
    for name, found in (("ttft", ttft), ("gap", gaps)):
        for length in PROMPT_TOKENS:
            pulled, computed = found["on"].median(length), found["off"].median(length)
            figures[f"survivor_{name}_ms_{length}"] = Figure(pulled, "ms", peer=computed)
            figures[f"survivor_{name}_ratio_{length}"] = Figure(computed / pulled, "x", "above 1")
        figures[f"survivor_{name}_pulled"] = Figure(percentile(found["on"].pulled, 0.5), "of the prompt")
    report("survivor", figures, as_json=options.json)


if __name__ == "__main__":
    main()
