"""What long prompts do to those who are being written to: one prefill and one decode worker against two mixed workers.

Requests that decode run all the time while prompts of 2,000 tokens arrive at a steady pace. Both deployments get the same
requests at the same times, in turn; the figure is the 99th percentile of the decoding requests' inter-token latency.
"""

from __future__ import annotations

import asyncio
import random

import httpx

from harness import STDERR, Figure, arguments, percentile, report, stream_completion
from polyphase.testing import Deployment

DEPLOYMENTS = {"split": ("--prefill", "1", "--decode", "1"), "mixed": ("--workers", "2")}
DECODING_COUNT = 6
DECODE_PROMPT_TOKENS = 32
DECODE_TOKENS = 300
LONG_PROMPT_TOKENS = 2000
LONG_OUTPUT_TOKENS = 4
LONG_EVERY_S = 1.0


def prompt_of(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(300, 1500) for _ in range(length)]


async def load(url: str, duration_s: float, seed: int) -> tuple[list[float], list[float], list[float]]:
    """Returns ITLs of the decoding requests, TTFTs of those, and TTFTs of the long prompts, in milliseconds."""
    itl: list[float] = []
    short_ttft: list[float] = []
    long_ttft: list[float] = []
    loop = asyncio.get_running_loop()
    end_s = loop.time() + duration_s

    async def decode(client: httpx.AsyncClient, stream: int) -> None:
        turn = 0
        while loop.time() < end_s:
            times = await stream_completion(client, prompt_of(DECODE_PROMPT_TOKENS, seed + 1000 * stream + turn), DECODE_TOKENS)
            itl.extend(times.itl_ms)
            short_ttft.append(times.ttft_ms)
            turn += 1

    async def prefill(client: httpx.AsyncClient, turn: int) -> None:
        times = await stream_completion(client, prompt_of(LONG_PROMPT_TOKENS, seed + 500_000 + turn), LONG_OUTPUT_TOKENS)
        long_ttft.append(times.ttft_ms)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client, asyncio.TaskGroup() as tasks:
        for stream in range(DECODING_COUNT):
            tasks.create_task(decode(client, stream))
        for turn in range(int(duration_s / LONG_EVERY_S)):
            await asyncio.sleep(LONG_EVERY_S)
            tasks.create_task(prefill(client, turn))
    return itl, short_ttft, long_ttft


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=20, help="length of one round (default 20)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds per deployment, in turn (default 2)")
    options = parser.parse_args()
    itl: dict[str, list[float]] = {name: [] for name in DEPLOYMENTS}
    long_ttft: dict[str, list[float]] = {name: [] for name in DEPLOYMENTS}
    for turn in range(options.rounds):
        for name, flags in DEPLOYMENTS.items():
            with STDERR.status(f"round {turn + 1} of {options.rounds}: {name} ({' '.join(flags)})"), Deployment("demo", *flags) as served:
                asyncio.run(load(served.url, 3, seed=7_000_000))  # warm up
                tokens, _, prompts = asyncio.run(load(served.url, options.seconds, seed=turn * 1_000_000))
            itl[name] += tokens
            long_ttft[name] += prompts
            STDERR.print(f"{name}: ITL p50 {percentile(tokens, 0.5):.1f} ms, p99 {percentile(tokens, 0.99):.1f} ms, {len(tokens)} tokens")
    split, mixed = itl["split"], itl["mixed"]
    figures = {
        "itl_p99_ratio": Figure(percentile(split, 0.99) / percentile(mixed, 0.99), "", "well below 1"),
        "itl_p99_ms_split": Figure(percentile(split, 0.99), "ms", peer=percentile(mixed, 0.99)),
        "itl_p50_ms_split": Figure(percentile(split, 0.5), "ms", peer=percentile(mixed, 0.5)),
        "itl_max_ms_split": Figure(max(split), "ms", peer=max(mixed)),
        "long_ttft_p50_ms_split": Figure(percentile(long_ttft["split"], 0.5), "ms", peer=percentile(long_ttft["mixed"], 0.5)),
        "decoded_tokens_split": Figure(len(split), "tokens", peer=len(mixed)),
    }
    report("disagg", figures, as_json=options.json)


if __name__ == "__main__":
    main()
