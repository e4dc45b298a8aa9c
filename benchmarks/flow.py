"""What is left to do for a hand-over when the prompt is computed, with the flow of KV and without.

Two torch engines with the demo model in this process, one thread each, prompts of 512, 2,000 and 8,000 tokens that nothing is cached of,
over shared memory and over TCP on loopback. `…_mb_left`: KV that has not arrived when the offer comes; it depends on the sizes of the
chunks only. `…_wait_ms`: from the offer until the decode engine can take the request. `peer` is the same without the flow. `…_wait_ratio`:
the median of with ÷ without over pairs that follow each other at once, in turns in either order; read that where the machine is busy.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import cast

from harness import STDERR, Figure, arguments, percentile, report
from polyphase.engines.torch import TorchSettings, load_torch_engine
from polyphase.engines.torch.engine import TorchEngine
from polyphase.transfer import Agent, PeerBlocks
from polyphase.transfer.backends.interface import Backend
from polyphase.transfer.backends.shm import ShmBackend
from polyphase.transfer.backends.tcp import TcpBackend
from polyphase.wire.requests import PullAhead, SamplingParams, SequenceOutput, StopConditions, Submit
from polyphase.worker.pulls_ahead import PullsAhead
from polyphase.worker.sources import OfferSources

PROMPT_TOKENS = (512, 2000, 8000)
MODEL = str(Path(__file__).resolve().parent.parent / "models" / "demo")
GREEDY = SamplingParams(seed=0, temperature=0)


class Pair:
    """A prefill and a decode engine that run; what they say comes in `told`."""

    def __init__(self, backend: type[Backend], stack: AsyncExitStack) -> None:
        self.engines = [load_torch_engine(TorchSettings(model=MODEL, thread_count=1, device="cpu")) for _ in range(2)]
        self.told: list[asyncio.Queue[SequenceOutput]] = [asyncio.Queue(), asyncio.Queue()]
        for engine in self.engines:
            stack.callback(engine.close)
        prefill, self.decode = self.engines
        lender, reader = (
            stack.enter_context(Agent(name, epoch=1, backends=[backend()], tcp_address="127.0.0.1:0")) for name in ("prefill", "decode")
        )
        region = lender.register(prefill.kv_memory, prefill.kv_layout)
        reader.register(self.decode.kv_memory, self.decode.kv_layout)
        card = lender.card_with(region.card)
        prefill.bind_offers(worker_id="prefill", epoch=1, endpoint="", agent=card, region_id=region.region_id)
        self.source = PeerBlocks(stack.enter_context(reader.connect(card)), region.card)
        self.ahead = PullsAhead(self.decode, self.decode, cast("OfferSources", self))
        stack.callback(self.ahead.close)
        for engine, told in zip(self.engines, self.told, strict=True):
            stack.push_async_callback(_end, asyncio.create_task(_follow(engine, told)))

    async def meet(self, agent: object, region_id: str) -> PeerBlocks:
        return self.source

    async def hand_over(self, name: str, length: int, *, has_flow: bool) -> tuple[float, float]:
        """Returns: megabytes left, and milliseconds until they were here."""
        generator = random.Random(name)
        prompt, size = [generator.randrange(300, 1500) for _ in range(length)], self.decode.kv_layout.block_size
        stop = StopConditions(max_tokens=2, ignore_eos=True)
        self.engines[0].submit(
            Submit(
                request_id=name,
                token_ids=prompt,
                prompt_token_count=length,
                sampling=GREEDY,
                stop=stop,
                hand_over=True,
                with_parts=has_flow,
            )
        )
        while (output := await self.told[0].get()).offer is None:
            if (part := output.part) is not None:
                end = part.first_block + len(part.block_ids)
                self.ahead.add(PullAhead(name, prompt[size * part.first_block : size * end], part))
        arrived = self.decode.load().cached_block_count
        began = time.perf_counter()
        token_ids = [*prompt, *output.token_ids]
        request = Submit(request_id=name, token_ids=token_ids, prompt_token_count=length, sampling=GREEDY, stop=stop, offer=output.offer)
        assert await self.ahead.complete(request, output.offer, self.source)
        wait_ms = (time.perf_counter() - began) * 1e3
        left = self.decode.load().cached_block_count - arrived
        self.decode.submit(request, self.source)
        self.ahead.forget(name)
        while (await self.told[1].get()).finish_reason is None:
            pass
        self.engines[0].release_lease(output.offer.lease_id)
        return left * self.decode.kv_layout.block_bytes / 1e6, wait_ms


async def _follow(engine: TorchEngine, told: asyncio.Queue[SequenceOutput]) -> None:
    await engine.run(lambda report: [told.put_nowait(output) for output in report.outputs] and None)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def measure(rounds: int) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    for name, backend in (("shm", ShmBackend), ("tcp", TcpBackend)):
        async with AsyncExitStack() as stack:
            pair = Pair(backend, stack)
            for length in PROMPT_TOKENS:
                found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
                for turn in range(-1, rounds):  # the first warms up
                    for has_flow, results in sorted(found.items(), key=lambda item: item[0] is (turn % 2 == 0)):
                        result = await pair.hand_over(f"{length} {turn} {has_flow}", length, has_flow=has_flow)
                        if turn >= 0:
                            results.append(result)
                for place, (what, unit) in enumerate((("mb_left", "MB"), ("wait_ms", "ms"))):
                    with_flow, without = (percentile([result[place] for result in found[has_flow]], 0.5) for has_flow in (True, False))
                    figures[f"{name}_{length}_{what}"] = Figure(with_flow, unit, peer=without)
                pairs = zip(found[True], found[False], strict=True)
                ratio = percentile([with_flow[1] / without[1] for with_flow, without in pairs], 0.5)
                figures[f"{name}_{length}_wait_ratio"] = Figure(ratio, "ratio")
                STDERR.print(f"{name}, {length} tokens: {figures[f'{name}_{length}_wait_ms'].value:.1f} ms")
    return figures


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="prompts of each length, with and without (default 5)")
    options = parser.parse_args()
    report("flow", asyncio.run(measure(options.rounds)), as_json=options.json)


if __name__ == "__main__":
    main()
