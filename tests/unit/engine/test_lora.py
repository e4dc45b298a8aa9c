"""With an adapter, greedy tokens are those of the model that the adapter amounts to; rows of a step do not touch each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from polyphase.core.errors import ModelLoadError, ModelNotFound
from polyphase.core.hashing import namespace_of, sequence_hashes
from polyphase.engines.interface import Ability, abilities_of
from polyphase.engines.torch.engine import TorchEngine
from polyphase.wire.events import BlocksStored
from tests.unit.engine.adapters import ATTENTION, merged_peer, save_adapter
from tests.unit.engine.tiny import Answers, Peer, assert_nothing_held, prompt_of, run_all, submit

MakeEngine = Callable[..., TorchEngine]
ModelFolder = Callable[[str], str]
PeerOf = Callable[[str], Peer]

LENGTHS = [1, 17, 100, 300]
COUNT = 8


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_base_and_adapters_in_one_batch(family: str, make_engine: MakeEngine, model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = model_folder(family)
    adapters = {"sql": save_adapter(tmp_path / "sql", folder, 1), "poet": save_adapter(tmp_path / "poet", folder, 2, ATTENTION, rank=2)}
    peers: dict[str | None, Peer] = {None: Peer(folder), **{name: merged_peer(folder, path) for name, path in adapters.items()}}
    engine = make_engine(family, adapters=adapters, max_batch_tokens=64)  # so that prompts are computed in chunks, beside decodes
    assert engine.card.adapters == ["poet", "sql"]
    assert Ability.LORA in abilities_of(engine)
    wanted = {(name, length): peer.greedy(prompt_of(length), COUNT) for name, peer in peers.items() for length in LENGTHS}
    assert len({tuple(tokens) for tokens in wanted.values()}) == len(wanted)  # each says something else
    for _ in range(2):  # the second time from the cache
        for name, length in wanted:
            engine.submit(submit(f"{name} {length}", prompt_of(length), COUNT, lora=name))
        answers = run_all(engine)
        assert {key: answers.tokens(f"{key[0]} {key[1]}") for key in wanted} == wanted
    assert all(answers.stats(f"{name} {length}").cached_token_count == (length - 1) // 16 * 16 for name, length in wanted)
    assert_nothing_held(engine)


def test_one_adapter_for_the_whole_step(make_engine: MakeEngine, model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = model_folder("llama")
    path = save_adapter(tmp_path / "a", folder, 3, use_rslora=True)
    engine = make_engine(adapters={"a": path})
    engine.submit(submit("r", prompt_of(50), COUNT, lora="a"))
    assert run_all(engine).tokens("r") == merged_peer(folder, path, scale=8 / 2).greedy(prompt_of(50), COUNT)  # alpha over the root of r


def test_blocks_of_an_adapter_are_told_of_under_its_name(make_engine: MakeEngine, model_folder: ModelFolder, tmp_path: Path) -> None:
    engine = make_engine(adapters={"a": save_adapter(tmp_path / "a", model_folder("llama"), 4)})
    prompt = prompt_of(40)
    engine.submit(submit("r", prompt, 1, lora="a", cache_salt="tenant"))
    events = [event for report in run_all(engine).reports for event in report.events if isinstance(event, BlocksStored)]
    assert [hash_ for event in events for hash_ in event.sequence_hashes] == sequence_hashes(prompt, 16, namespace_of("tenant", "a"))
    engine.submit(submit("base", prompt, 1, cache_salt="tenant"))
    assert run_all(engine).stats("base").cached_token_count == 0


def test_an_unknown_adapter_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with pytest.raises(ModelNotFound, match="no LoRA adapter 'a'"):
        engine.submit(submit("r", prompt_of(3), 1, lora="a"))
    assert run_all(engine, Answers()).outputs == {}


def test_kv_of_other_adapters_is_never_taken(make_engine: MakeEngine, model_folder: ModelFolder, tmp_path: Path) -> None:
    """Blocks are named by the adapter's name: where its content differs, the layout does."""
    folder = model_folder("llama")
    one, same, other = (save_adapter(tmp_path / name, folder, seed) for name, seed in (("x", 5), ("y", 5), ("z", 6)))
    prints = [make_engine(adapters={"a": path}).kv_layout.fingerprint for path in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]
    assert make_engine().kv_layout.fingerprint not in prints


def _config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return apply


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter_config.json"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), "cannot be read"),
        (_config(r=0), "states no rank"),
        (_config(peft_type="IA3"), "is IA3; the torch engine runs LoRA adapters"),
        (_config(use_dora=True), "use_dora = True"),
        (_config(modules_to_save=["lm_head"]), "modules_to_save"),
        (_tensors(lambda tensors: {"odd": torch.zeros(2, 2)}), "changes odd"),
        (_tensors(lambda tensors: {k.replace("layers.1", "layers.9"): v for k, v in tensors.items()}), "has no model.layers.9"),
        (_tensors(lambda tensors: {k: v[:, :-1].contiguous() if "lora_A" in k else v for k, v in tensors.items()}), "other dimensions"),
        (_tensors(lambda tensors: {k: v for k, v in tensors.items() if "lora_A" in k}), "only one of A and B"),
    ],
)
def test_what_is_wrong_with_an_adapter_is_said(
    spoil: Callable[[Path], object], sentence: str, make_engine: MakeEngine, model_folder: ModelFolder, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "a", model_folder("llama"), 1)
    spoil(tmp_path / "a")
    with pytest.raises(ModelLoadError, match=sentence):
        make_engine(adapters={"a": str(tmp_path / "a")})
