"""Tiny models with random weights, and short ways to ask an engine for tokens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from polyphase.engines.interface import StepReport
from polyphase.engines.torch.engine import TorchEngine
from polyphase.wire.requests import FinishReason, PhaseStats, SamplingParams, SequenceOutput, StopConditions, Submit

VOCAB_SIZE = 320
EOS_ID = 319
CONTEXT_LENGTH = 2304

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_LENGTH,
    "initializer_range": 0.3,  # wide, so that what is said depends on the prompt
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "pad_token_id": 0,
}


def config_of(family: str, **changes: Any) -> PretrainedConfig:
    kinds: dict[str, Any] = {
        "llama": LlamaConfig,
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
        "mistral": MistralConfig,
        "mistral-window": MistralConfig,
        "qwen2-window": Qwen2Config,
    }
    extra: dict[str, Any] = {
        "qwen3": {"head_dim": 32},
        "mistral": {"sliding_window": None, "head_dim": 16},
        "mistral-window": {"sliding_window": 40, "head_dim": 16},
        "qwen2-window": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    }.get(family, {})
    config: PretrainedConfig = kinds[family](**{**_SIZES, **extra, **changes})
    return config


def save_model(folder: Path, config: PretrainedConfig) -> str:
    torch.manual_seed(7)
    factory: Any = AutoModelForCausalLM
    model = factory.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # initialised to constants; random ones find more mistakes
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def save_tokenizer(folder: Path) -> None:
    """One token per byte, so that token 64 is the letter "a" and text is easy to predict."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


class Peer:
    """transformers alone on the same folder."""

    def __init__(self, folder: str) -> None:
        factory: Any = AutoModelForCausalLM
        self.model: PreTrainedModel = factory.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()

    def greedy(self, prompt: list[int], count: int, **settings: Any) -> list[int]:
        config = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0, **settings)
        ids = torch.tensor([prompt])
        model: Any = self.model
        model.generation_config = config  # otherwise what is None here is taken from there
        tokens: list[int] = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0].tolist()
        return tokens[len(prompt) :]

    def logits(self, tokens: list[int]) -> torch.Tensor:
        model: Any = self.model
        with torch.inference_mode():
            found: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
        return found


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{length} {seed}")
    return [rng.randrange(VOCAB_SIZE - 1) for _ in range(length)]


def submit(
    request_id: str,
    prompt: list[int],
    max_tokens: int = 8,
    *,
    emitted: list[int] | None = None,
    sampling: SamplingParams | None = None,
    stop: StopConditions | None = None,
    **fields: Any,
) -> Submit:
    return Submit(
        request_id=request_id,
        token_ids=prompt + (emitted or []),
        prompt_token_count=len(prompt),
        sampling=sampling or SamplingParams(seed=0, temperature=0),
        stop=stop or StopConditions(max_tokens=max_tokens, ignore_eos=True),
        **fields,
    )


class Answers:
    """Collects reports; holds every request to exactly one end."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[SequenceOutput]] = {}
        self.reports: list[StepReport] = []

    def add(self, report: StepReport) -> None:
        self.reports.append(report)
        for output in report.outputs:
            earlier = self.outputs.setdefault(output.request_id, [])
            assert all(one.finish_reason is None for one in earlier), f"{output.request_id} goes on after its end"
            earlier.append(output)

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs.get(request_id, []) for token in output.token_ids]

    def end(self, request_id: str) -> SequenceOutput:
        last = self.outputs[request_id][-1]
        assert last.finish_reason is not None, f"{request_id} has not ended"
        return last

    def reason(self, request_id: str) -> FinishReason | None:
        return self.end(request_id).finish_reason

    def stats(self, request_id: str) -> PhaseStats:
        found = [output.stats for output in self.outputs[request_id] if output.stats is not None]
        assert len(found) == 1
        return found[0]


def run_all(engine: TorchEngine, answers: Answers | None = None, step_limit: int = 5000) -> Answers:
    """Step until nothing is left to do."""
    answers = answers or Answers()
    for _ in range(step_limit):
        report = engine.step()
        if report is None:
            if not engine.core.has_requests:
                return answers
            continue
        answers.add(report)
    raise AssertionError(f"the engine is not done after {step_limit} steps: {engine.load()}")


def assert_nothing_held(engine: TorchEngine) -> None:
    engine.core.pool.check_invariants()
    load = engine.load()
    assert (load.running_count, load.waiting_count, load.waiting_prefill_tokens) == (0, 0, 0)
    assert (load.used_block_count, load.leased_block_count) == (0, 0)
