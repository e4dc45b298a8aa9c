"""Which models are recorded, and that a recording which is wrong is never used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from polyphase.engines.torch.hook import ATTENTION_NAME, register
from polyphase.engines.torch.tracing import _LogitsOnly, make_forward

ModelFolder = Callable[[str], str]


def load(folder: str) -> Any:
    register()
    factory: Any = AutoModelForCausalLM
    return factory.from_pretrained(folder, dtype=torch.float32, attn_implementation=ATTENTION_NAME).eval().requires_grad_(False)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "mistral-window", "qwen2-window"])
def test_the_usual_models_are_recorded(family: str, model_folder: ModelFolder) -> None:
    assert not isinstance(make_forward(load(model_folder(family)), torch.device("cpu")), _LogitsOnly)


class _Looks(nn.Module):
    """Does something else for some tokens."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * 2 if bool(hidden.sum() > 0) else hidden


class _Counts(nn.Module):
    """Puts the number of tokens into the result as a constant."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * float(len(hidden[0].tolist()))


@pytest.mark.parametrize("oddity", [_Looks(), _Counts()])
def test_a_model_that_looks_at_values_is_not(oddity: nn.Module, model_folder: ModelFolder) -> None:
    model = load(model_folder("llama"))
    model.model.norm = nn.Sequential(model.model.norm, oddity)
    assert isinstance(make_forward(model, torch.device("cpu")), _LogitsOnly)


def test_a_recording_that_disagrees_is_not_used(model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(model_folder("llama"))
    monkeypatch.setattr("polyphase.engines.torch.tracing._record", lambda plain, *_: lambda *example: plain(*example) + 1)
    assert isinstance(make_forward(model, torch.device("cpu")), _LogitsOnly)
