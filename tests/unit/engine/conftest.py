"""Models are saved once for the whole run; engines are made by the tests and closed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from polyphase.engines.torch import TorchSettings, load_torch_engine
from polyphase.engines.torch.engine import TorchEngine
from tests.unit.engine.tiny import Peer, config_of, save_model

ModelFolder = Callable[[str], str]
MakeEngine = Callable[..., TorchEngine]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """The folder of a tiny model of some family."""
    torch.set_num_threads(1)
    made: dict[str, str] = {}

    def folder(family: str) -> str:
        if family not in made:
            made[family] = save_model(tmp_path_factory.mktemp(family), config_of(family))
        return made[family]

    return folder


@pytest.fixture(scope="session")
def peer_of(model_folder: ModelFolder) -> Callable[[str], Peer]:
    made: dict[str, Peer] = {}

    def peer(family: str) -> Peer:
        if family not in made:
            made[family] = Peer(model_folder(family))
        return made[family]

    return peer


@pytest.fixture
def make_engine(model_folder: ModelFolder) -> Iterator[MakeEngine]:
    engines: list[TorchEngine] = []

    def make(family: str = "llama", **changes: Any) -> TorchEngine:
        settings = {"thread_count": 1, "device": "cpu", "kv_bytes": 8 << 20, "max_batch_tokens": 256, **changes}
        engines.append(load_torch_engine(TorchSettings(model=model_folder(family), **settings)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
