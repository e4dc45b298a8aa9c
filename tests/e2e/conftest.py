"""Real processes, the shipped model, the official OpenAI client; and transformers' own `generate` as the truth about tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from openai import OpenAI

from polyphase.testing import Deployment

MODEL_FOLDER = Path(__file__).parents[2] / "models" / "demo"
GreedyTokens = Callable[[list[int], int], list[int]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return MODEL_FOLDER


@pytest.fixture(scope="session")
def greedy() -> GreedyTokens:
    """`greedy(prompt_ids, count)`: what `model.generate` in float32 writes, going on after EOS."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(prompt_ids: list[int], count: int) -> list[int]:
        with torch.inference_mode():
            ids = torch.tensor([prompt_ids])
            written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        return written[0, len(prompt_ids) :].tolist()

    return generate


@pytest.fixture(scope="session")
def split() -> Iterator[Deployment]:
    """One prefill worker and two decode workers; prompts of 64 tokens and more are split."""
    with Deployment("demo", "--prefill", "1", "--decode", "2", "--split-threshold", "64") as served:
        yield served


@pytest.fixture
def client(split: Deployment) -> OpenAI:
    return OpenAI(base_url=f"{split.url}/v1", api_key="none", max_retries=0, timeout=60)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """`length` token ids that no other length or seed begins with, well inside every tokenizer's ordinary range."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return (torch.randint(0, 1000, (length,), generator=generator) + 300).tolist()


def completed_ids(response: object) -> list[int]:
    """Token ids of a completion that was asked for with `return_token_ids`."""
    return list(response.choices[0].token_ids)  # type: ignore[attr-defined]
