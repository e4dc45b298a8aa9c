"""What it brings to send a conversation's next turn to where the last one is cached: policy `kv` against `round-robin`.

Real torch workers on this machine, with a model of random weights that is large enough for reading a prompt to cost something. People talk
with it over several turns, some at the same time, all under one system prompt; a turn's prompt is all that was said before and something
new. Both policies get the same people, words and pauses, in turn; the figure is the mean time to the first token.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from harness import STDERR, Figure, arguments, percentile, report, stream_completion
from polyphase.testing import Deployment

POLICIES = ("kv", "round-robin")
DEMO_MODEL = Path(__file__).parents[1] / "models" / "demo"
MODEL_NAME = "random"
VOCAB_SIZE = 3072  # of the demo model's tokenizer, which is used here, too
CONTEXT_TOKENS = 4096

SYSTEM_TOKENS = 256
NEW_TOKENS = (60, 180)  # least and most of what a person says in a turn
OUTPUT_TOKENS = 24
TURNS = 6
PAUSE_S = 0.5  # mean, exponentially distributed
AT_ONCE = 3  # people who talk at the same time; the next one begins when one is done


@dataclass(slots=True)
class Measured:
    ttft_ms: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / max(1, self.prompt_tokens)

    @property
    def mean_ms(self) -> float:
        return sum(self.ttft_ms) / len(self.ttft_ms)


def make_model(folder: Path) -> Path:
    """About 25 million parameters: some thousand prompt tokens a second on one core."""
    torch.manual_seed(0)
    transformers_logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, folder / name)
    return folder


def words(random_numbers: random.Random, count: int) -> list[int]:
    return [random_numbers.randrange(300, VOCAB_SIZE) for _ in range(count)]


async def talk(client: httpx.AsyncClient, person: random.Random, system: list[int], measured: Measured) -> None:
    said = list(system)
    for _ in range(TURNS):
        await asyncio.sleep(person.expovariate(1 / PAUSE_S))
        said += words(person, person.randint(*NEW_TOKENS))
        times = await stream_completion(client, said, OUTPUT_TOKENS, MODEL_NAME)
        measured.ttft_ms.append(times.ttft_ms)
        said += times.token_ids


async def cached_and_prompt_tokens(client: httpx.AsyncClient) -> tuple[int, int]:
    """As the workers report them; the latest report may be a second old."""
    await asyncio.sleep(1.5)
    workers = (await client.get("/health")).raise_for_status().json()["models"][MODEL_NAME]["workers"].values()
    return sum(w["cached_prompt_tokens_total"] for w in workers), sum(w["prompt_tokens_total"] for w in workers)


async def load(url: str, people: int, seed: int) -> Measured:
    measured = Measured()
    system = words(random.Random(seed), SYSTEM_TOKENS)
    waiting = iter(range(people))

    async def talk_one_after_the_other(client: httpx.AsyncClient) -> None:
        for number in waiting:
            await talk(client, random.Random(seed + 1 + number), system, measured)

    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
        cached_before, prompt_before = await cached_and_prompt_tokens(client)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(AT_ONCE):
                tasks.create_task(talk_one_after_the_other(client))
        cached, prompt = await cached_and_prompt_tokens(client)
    measured.cached_tokens, measured.prompt_tokens = cached - cached_before, prompt - prompt_before
    return measured


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--people", type=int, default=6, help="conversations in one round (default 6)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds per policy, in turn (default 2)")
    parser.add_argument("--workers", type=int, default=2, help="workers that prefill and decode (default 2)")
    options = parser.parse_args()
    total = {policy: Measured() for policy in POLICIES}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / MODEL_NAME)
        for turn in range(options.rounds):
            for policy in POLICIES:
                flags = ("--workers", str(options.workers), "--policy", policy)
                with STDERR.status(f"round {turn + 1} of {options.rounds}: {policy}"), Deployment(model, *flags) as served:
                    asyncio.run(load(served.url, options.workers, seed=9_000_000))  # warm up
                    found = asyncio.run(load(served.url, options.people, seed=turn * 1_000_000))
                STDERR.print(
                    f"{policy}: TTFT mean {found.mean_ms:.0f} ms, p50 {percentile(found.ttft_ms, 0.5):.0f} ms, "
                    f"p99 {percentile(found.ttft_ms, 0.99):.0f} ms, hit rate {found.hit_rate:.2f}, {len(found.ttft_ms)} turns"
                )
                total[policy].ttft_ms += found.ttft_ms
                total[policy].cached_tokens += found.cached_tokens
                total[policy].prompt_tokens += found.prompt_tokens
    ours, peer = total["kv"], total["round-robin"]
    figures = {
        "ttft_mean_ratio": Figure(ours.mean_ms / peer.mean_ms, "", "below 1"),
        "ttft_mean_ms": Figure(ours.mean_ms, "ms", peer=peer.mean_ms),
        "ttft_p50_ms": Figure(percentile(ours.ttft_ms, 0.5), "ms", peer=percentile(peer.ttft_ms, 0.5)),
        "ttft_p99_ms": Figure(percentile(ours.ttft_ms, 0.99), "ms", peer=percentile(peer.ttft_ms, 0.99)),
        "hit_rate": Figure(ours.hit_rate, "", peer=peer.hit_rate),
    }
    report("routing_real", figures, as_json=options.json)


if __name__ == "__main__":
    main()
