"""Speed of the torch engine against transformers on the same model, in the same process, turn by turn.

    speedup_c1     tokens/s of one request at a time       peer: `generate`, one request at a time
    speedup_c16    tokens/s of 16 requests at once         peer: the same
    prefill_ratio  prompt tokens/s of one long prompt      peer: one plain forward pass (sdpa, logits of the last token only)

Each round measures engine and peer one after the other, so that a machine that slows down slows both; a figure is the median of the rounds'
quotients. The engine is driven as a worker drives it, through `run`.

    python benchmarks/engine.py [--model models/demo] [--json]
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from transformers import AutoModelForCausalLM, GenerationConfig

from harness import STDERR, Figure, arguments, report
from polyphase.engines.interface import StepReport
from polyphase.engines.torch import TorchSettings, load_torch_engine
from polyphase.engines.torch.engine import TorchEngine
from polyphase.wire.requests import SamplingParams, StopConditions, Submit

REPOSITORY = Path(__file__).resolve().parent.parent
TARGETS = {"speedup_c1": 1.0, "speedup_c16": 4.0, "prefill_ratio": 0.9}


@dataclass(frozen=True)
class Load:
    """What one measurement asks for."""

    prompt_tokens: int
    output_tokens: int
    request_count: int

    @property
    def counted_tokens(self) -> int:
        """Output tokens, or prompt tokens where the output is a single token."""
        return self.request_count * (self.prompt_tokens if self.output_tokens == 1 else self.output_tokens)


@dataclass
class Series:
    """Tokens per second of engine and peer, round by round."""

    engine: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)

    @property
    def quotient(self) -> float:
        return statistics.median(e / p for e, p in zip(self.engine, self.peer, strict=True))


class EngineSide:
    """The engine under `run`, as in a worker."""

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine
        self._count = 0

    def measure(self, load: Load, prompts: list[list[int]]) -> float:
        return asyncio.run(self._measure(load, prompts))

    async def _measure(self, load: Load, prompts: list[list[int]]) -> float:
        finished = asyncio.Event()
        unfinished = len(prompts)

        def on_step(report: StepReport) -> None:
            nonlocal unfinished
            for output in report.outputs:
                if output.failure is not None:
                    raise RuntimeError(output.failure.message)
                unfinished -= output.finish_reason is not None
            if not unfinished:
                finished.set()

        runner = asyncio.create_task(self._engine.run(on_step))
        await asyncio.sleep(0)
        started = time.perf_counter()
        for prompt in prompts:
            self._count += 1
            self._engine.submit(
                Submit(
                    request_id=f"bench-{self._count}",
                    token_ids=prompt,
                    prompt_token_count=len(prompt),
                    sampling=SamplingParams(seed=0, temperature=0),
                    stop=StopConditions(max_tokens=load.output_tokens, ignore_eos=True),
                )
            )
        waiter = asyncio.create_task(finished.wait())
        await asyncio.wait([runner, waiter], return_when=asyncio.FIRST_COMPLETED)
        duration_s = time.perf_counter() - started
        for task in (waiter, runner):
            task.cancel()
        results = await asyncio.gather(waiter, runner, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, asyncio.CancelledError):
                raise result
        return load.counted_tokens / duration_s


class PeerSide:
    """transformers alone."""

    def __init__(self, model: str, device: torch.device, dtype: torch.dtype) -> None:
        factory: Any = AutoModelForCausalLM
        self._model = factory.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").to(device).eval()
        self._device = device

    def generate(self, load: Load, prompts: list[list[int]]) -> float:
        """One request at a time."""
        config = GenerationConfig(max_new_tokens=load.output_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        self._model.generation_config = config
        started = time.perf_counter()
        for prompt in prompts:
            ids = torch.tensor([prompt], device=self._device)
            out = self._model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            if out.shape[1] != load.prompt_tokens + load.output_tokens:
                raise RuntimeError(f"generate gave {out.shape[1] - load.prompt_tokens} tokens instead of {load.output_tokens}")
        return len(prompts) * load.output_tokens / (time.perf_counter() - started)

    def prefill(self, load: Load, prompts: list[list[int]]) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            for prompt in prompts:
                logits = self._model(torch.tensor([prompt], device=self._device), use_cache=False, logits_to_keep=1).logits
                logits.argmax(dim=-1).item()
        return len(prompts) * load.prompt_tokens / (time.perf_counter() - started)


@dataclass(frozen=True)
class Duel:
    """One figure: what the engine and the peer are asked in each round, and how often."""

    load: Load
    peer_load: Load
    peer: Callable[[Load, list[list[int]]], float]
    rounds: int


def measure(engine: EngineSide, duels: dict[str, Duel], vocab_size: int, on_progress: Callable[[], None]) -> dict[str, Series]:
    """Figure after figure; within each, rounds of engine and peer, who take turns in beginning. The first round is not counted."""
    rng = random.Random(0)

    def prompts(load: Load) -> list[list[int]]:
        return [[rng.randrange(vocab_size) for _ in range(load.prompt_tokens)] for _ in range(load.request_count)]

    series = {name: Series() for name in duels}
    for name, duel in duels.items():
        for turn in range(duel.rounds + 1):
            asked = {"engine": prompts(duel.load), "peer": prompts(duel.peer_load)}
            rates: dict[str, float] = {}
            for side in ("engine", "peer") if turn % 2 else ("peer", "engine"):
                rates[side] = engine.measure(duel.load, asked[side]) if side == "engine" else duel.peer(duel.peer_load, asked[side])
            if turn:
                series[name].engine.append(rates["engine"])
                series[name].peer.append(rates["peer"])
            on_progress()
    return series


def figures(series: dict[str, Series]) -> dict[str, Figure]:
    rates = {"speedup_c1": "tokens_per_s_c1", "speedup_c16": "tokens_per_s_c16", "prefill_ratio": "prefill_tokens_per_s"}
    found: dict[str, Figure] = {}
    for name, one in series.items():
        found[name] = Figure(round(one.quotient, 3), "ratio", f">= {TARGETS[name]}", 1.0)
        found[rates[name]] = Figure(statistics.median(one.engine), "tokens/s", peer=statistics.median(one.peer))
    return found


def random_model(folder: Path) -> str:
    """A model of the demo's size with random weights, for a repository without the demo model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=4096,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--model", default=None, help="folder or hub name (default: models/demo, or random weights of that size)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None, help="torch threads of both sides (default: the engine's choice)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    demo = REPOSITORY / "models" / "demo"
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or (str(demo) if (demo / "config.json").exists() else random_model(Path(folder)))
        engine = load_torch_engine(
            TorchSettings(model=model, thread_count=options.threads, device=options.device, dtype=options.dtype, kv_bytes=256 << 20)
        )
        try:
            peer = PeerSide(model, engine.device, engine.dtype)
            one, four, many = Load(64, 64, 1), Load(64, 64, 4), Load(64, 64, 16)
            long = Load(min(2000, engine.card.context_length - 2), 1, 1)
            duels = {
                "speedup_c1": Duel(one, one, peer.generate, 3 * options.rounds),
                "speedup_c16": Duel(many, four, peer.generate, options.rounds),
                "prefill_ratio": Duel(long, long, peer.prefill, 3 * options.rounds),
            }
            with Progress(console=STDERR, transient=True) as progress:
                total = sum(duel.rounds + 1 for duel in duels.values())
                task = progress.add_task(f"engine and peer, turn by turn, {torch.get_num_threads()} threads", total=total)
                series = measure(EngineSide(engine), duels, engine.card.vocab_size, lambda: progress.advance(task))
        finally:
            engine.close()
    report("engine", figures(series), as_json=options.json)
    return 0 if all(one.quotient >= TARGETS[name] for name, one in series.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
