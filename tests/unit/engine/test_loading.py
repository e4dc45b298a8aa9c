"""Models that are missing, broken, or that this engine would compute wrongly, are refused in one clear sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, GPT2Config, MixtralConfig

from polyphase.core.errors import ConfigurationError, ModelLoadError
from polyphase.engines.batching.sizing import size_cache
from polyphase.engines.torch import TorchSettings, load_torch_engine
from polyphase.engines.torch.engine import TorchEngine
from tests.unit.engine.tiny import CONTEXT_LENGTH, EOS_ID, Peer, config_of, prompt_of, run_all, save_model, submit

ModelFolder = Callable[[str], str]
MakeEngine = Callable[..., TorchEngine]


def load(folder: Path | str, **changes: Any) -> None:
    load_torch_engine(TorchSettings(**{"model": str(folder), "thread_count": 1, "device": "cpu", "kv_bytes": 1 << 20, **changes})).close()


@pytest.fixture
def copy(tmp_path: Path, model_folder: ModelFolder) -> Path:
    """A folder of one's own to break."""
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))


def edit(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c"])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(ModelLoadError, match=f"there is no folder {name}"):
        load(name)


def test_a_folder_without_a_model(tmp_path: Path, copy: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelLoadError, match=r"holds no model: it has no config\.json"):
        load(tmp_path / "empty")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="holds no weights"):
        load(copy)
    with pytest.raises(ModelLoadError, match="is a file"):
        load(copy / "config.json")


def test_a_hub_name_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match=r"polyphase-tests/none, it is not in the local cache, and .* cannot be reached"):
        load("polyphase-tests/none")


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "unheard-of"}', "{}"])
def test_a_broken_configuration(content: str, copy: Path) -> None:
    (copy / "config.json").write_text(content)
    with pytest.raises(ModelLoadError, match="cannot be read"):
        load(copy)


def test_broken_weights(copy: Path) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelLoadError, match=r"the weights of .* cannot be loaded"):
        load(copy)


def test_missing_and_misshapen_weights(copy: Path) -> None:
    edit(copy, "config.json", num_hidden_layers=3)
    with pytest.raises(ModelLoadError, match="are missing"):
        load(copy)
    edit(copy, "config.json", num_hidden_layers=2, vocab_size=300)
    with pytest.raises(ModelLoadError, match=r"cannot be loaded|have another shape"):
        load(copy)


def test_a_missing_or_broken_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="tokenizer"):
        load(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json"):
        load(copy)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (Gemma2Config(vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                      num_key_value_heads=1, head_dim=16), "softcap"),
        (config_of("llama", num_hidden_layers=1, rope_parameters={"rope_type": "default", "rope_theta": 1e4}), None),
        (GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=128), None),
    ],
    ids=["gemma2", "llama", "gpt2"],
)  # fmt: skip
def test_other_architectures_run_rightly_or_not_at_all(config: Any, why: str | None, tmp_path: Path) -> None:
    folder = save_model(tmp_path, config)
    if why is not None:
        with pytest.raises(ModelLoadError, match=why):
            load(folder)
        return
    engine = load_torch_engine(TorchSettings(model=folder, thread_count=1, device="cpu", kv_bytes=1 << 20, max_batch_tokens=32))
    engine.submit(submit("a", prompt_of(50), 6))
    assert run_all(engine).tokens("a") == Peer(folder).greedy(prompt_of(50), 6)
    engine.close()


def test_experts_are_picked_anew_for_every_token(tmp_path: Path) -> None:
    """A mixture of experts looks at values, so it must not be recorded, or must be recorded rightly."""
    config = MixtralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, max_position_embeddings=512, initializer_range=0.3, eos_token_id=None, bos_token_id=None, sliding_window=None,
    )  # fmt: skip
    folder = save_model(tmp_path, config)
    engine = load_torch_engine(TorchSettings(model=folder, thread_count=1, device="cpu", kv_bytes=1 << 20, max_batch_tokens=32))
    peer = Peer(folder)
    for length in (5, 50, 100):
        engine.submit(submit(f"{length}", prompt_of(length), 8))
    answers = run_all(engine)
    assert [answers.tokens(f"{n}") for n in (5, 50, 100)] == [peer.greedy(prompt_of(n), 8) for n in (5, 50, 100)]
    engine.close()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention|cannot be read"),
        ({"attention_chunk_size": 128}, "chunked attention"),
        ({"alibi": True}, "ALiBi"),
    ],
)
def test_what_would_be_computed_wrongly(changes: dict[str, Any], why: str, copy: Path) -> None:
    edit(copy, "config.json", **changes)
    with pytest.raises(ModelLoadError, match=why):
        load(copy)


def test_devices_and_settings(model_folder: ModelFolder) -> None:
    with pytest.raises(ModelLoadError, match="is not a device"):
        load(model_folder("llama"), device="abacus")
    with pytest.raises(ModelLoadError, match="runs on cpu and cuda"):
        load(model_folder("llama"), device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(ModelLoadError, match="sees no CUDA device"):
            load(model_folder("llama"), device="cuda")
    for wrong in ({"dtype": "int8"}, {"block_size": 0}, {"max_running": 0}, {"lease_s": 0}, {"context_length": 1}, {"model": ""}):
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            load(model_folder("llama"), **wrong) if "model" not in wrong else TorchSettings(model="")


def test_the_card_reads_the_model_s_files(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    (copy / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [EOS_ID, 3], "bos_token_id": 2, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "do_sample": True})
    )
    (copy / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "old"}))
    engine = load_torch_engine(TorchSettings(model=str(copy), thread_count=1, device="cpu", kv_bytes=1 << 20))
    card = engine.card
    engine.close()
    assert card.chat_template == "{{ messages }}"
    assert (card.bos_token, card.eos_token, card.bos_token_id, card.eos_token_ids) == ("<s>", "</s>", 2, [EOS_ID, 3])
    assert (card.default_temperature, card.default_top_p, card.default_top_k) == (0.6, 0.9, 20)
    assert card.name == "model"
    assert card.tokenizer_json == (copy / "tokenizer.json").read_bytes()


def test_fingerprints_tell_models_apart_and_copies_not(copy: Path, make_engine: MakeEngine) -> None:
    def fingerprint(**changes: Any) -> str:
        return make_engine(**changes).kv_layout.fingerprint

    original = fingerprint()
    same = load_torch_engine(TorchSettings(model=str(copy), thread_count=1, device="cpu", kv_bytes=1 << 20))
    assert same.kv_layout.fingerprint == original
    same.close()
    assert fingerprint(family="qwen3") != original
    assert fingerprint(dtype="bfloat16") != original


class TestSizing:
    def sized(self, **changes: Any) -> Any:
        base: dict[str, Any] = {
            "block_size": 16,
            "block_bytes": 1000,
            "kv_bytes": None,
            "is_device": False,
            "available_bytes": 10**9,
            "model_context_length": 160,
            "wanted_context_length": None,
        }
        return size_cache(**{**base, **changes})

    def test_sixteen_contexts_if_memory_allows(self) -> None:
        assert self.sized().block_count == 160
        assert self.sized(available_bytes=100_000).block_count == 20
        assert self.sized(available_bytes=None, model_context_length=10**7).block_count == (256 << 20) // 1000

    def test_a_device_is_used_to_the_full(self) -> None:
        assert self.sized(is_device=True, available_bytes=10**6).block_count == 850

    def test_a_small_cache_shortens_the_context(self) -> None:
        assert self.sized(kv_bytes=5_000).context_length == 80

    def test_but_not_one_that_was_asked_for(self) -> None:
        with pytest.raises(ConfigurationError, match="choose more KV bytes or a shorter context"):
            self.sized(kv_bytes=5_000, wanted_context_length=100)
        with pytest.raises(ConfigurationError, match="the model's is 160"):
            self.sized(wanted_context_length=CONTEXT_LENGTH)
        with pytest.raises(ConfigurationError, match="do not hold a single block"):
            self.sized(kv_bytes=500)
        with pytest.raises(ConfigurationError, match="choose a context length"):
            self.sized(model_context_length=None)
