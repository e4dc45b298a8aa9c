"""The demo model in `models/demo`: its folder is small and complete, its tokenizer and chat template keep prefixes, it answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

FOLDER = Path(__file__).parents[2] / "models" / "demo"
SIZE_MAX_BYTES = 9_500_000
CONVERSATION = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What does json.dumps do?"},
    {"role": "assistant", "content": "Serialize obj to a JSON formatted str."},
    {"role": "user", "content": "\n Show me its signature.\n"},
    {"role": "assistant", "content": " The signature is json.dumps(obj)\n\n"},
    {"role": "user", "content": "Ünïcode 日本語 🙂 <tag> {{ braces }}"},
]


def read_json(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def render(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    """As a frontend does it: Jinja's sandbox, no transformers."""
    config = read_json("tokenizer_config.json")
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(config["chat_template"])
    return template.render(
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        bos_token=config["bos_token"],
        eos_token=config["eos_token"],
    )


def test_the_folder_is_complete_and_small() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= SIZE_MAX_BYTES


def test_config_and_tokenizer_agree(tokenizer: Tokenizer) -> None:
    config, generation, tokens = read_json("config.json"), read_json("generation_config.json"), read_json("tokenizer_config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    assert config["max_position_embeddings"] == tokens["model_max_length"] == 8192
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["eos_token_id"] == generation["eos_token_id"]
    assert [tokenizer.id_to_token(token_id) for token_id in generation["eos_token_id"]] == ["<|im_end|>", "<|endoftext|>"]
    assert tokens["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What does os.path.join do?",
        "  two  spaces\n\n\ttab \n",
        "Ünïcode 日本語 🙂\r\n",
        "x = [1, 20]",
        "<|im_start|>user\nhi<|im_end|>",
    ],
)
def test_the_tokenizer_gives_back_any_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_tokenizer_is_good_at_its_subject(tokenizer: Tokenizer) -> None:
    text = "Return a copy of the string with leading and trailing whitespace removed."
    assert len(tokenizer.encode(text).ids) <= len(text.split()) + 4


def test_more_turns_never_change_the_tokens_before_them(tokenizer: Tokenizer) -> None:
    for count in range(1, len(CONVERSATION)):
        shorter = render(CONVERSATION[:count], add_generation_prompt=False)
        asked = render(CONVERSATION[:count], add_generation_prompt=True)
        longer = render(CONVERSATION[: count + 1], add_generation_prompt=False)
        longer_ids = tokenizer.encode(longer).ids
        assert longer.startswith(shorter)
        assert asked == shorter + "<|im_start|>assistant\n"
        for prefix in [shorter, *([asked] if CONVERSATION[count]["role"] == "assistant" else [])]:
            prefix_ids = tokenizer.encode(prefix).ids
            assert longer_ids[: len(prefix_ids)] == prefix_ids


def test_the_weights_are_finite_and_far_from_overflow() -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    for name, tensor in safetensors.load_file(FOLDER / "model.safetensors").items():
        assert str(tensor.dtype) == "torch.float16", name
        assert tensor.float().abs().max().item() < 100, name


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """The model and the tokenizer as transformers loads them, offline."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32", local_files_only=True)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


def answer(loaded: tuple[Any, Any], messages: list[dict[str, str]]) -> str:
    """The greedy answer; it must end by itself."""
    model, tokenizer = loaded
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, do_sample=False, temperature=None, top_p=None, max_new_tokens=96)[0, prompt["input_ids"].shape[1] :]
    assert output[-1].item() in read_json("generation_config.json")["eos_token_id"]
    return tokenizer.decode(output, skip_special_tokens=True)


def test_transformers_reads_the_same_tokens_and_template(loaded: tuple[Any, Any], tokenizer: Tokenizer) -> None:
    rendered = render(CONVERSATION, add_generation_prompt=True)
    assert loaded[1].apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False) == rendered
    assert loaded[1].apply_chat_template(CONVERSATION, add_generation_prompt=True)["input_ids"] == tokenizer.encode(rendered).ids


def test_it_knows_its_docs_by_heart(loaded: tuple[Any, Any]) -> None:
    messages = [{"role": "user", "content": "What does json.dumps do?"}]
    first = answer(loaded, messages)
    assert first == "Serialize obj to a JSON formatted str."
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "What does ValueError mean?"}]
    assert answer(loaded, messages) == "Inappropriate argument value (of correct type)."


def test_it_says_who_it_is_in_plain_words(loaded: tuple[Any, Any]) -> None:
    text = answer(loaded, [{"role": "user", "content": "Who are you?"}])
    assert "Polyphase" in text
    assert "standard library" in text
    assert re.fullmatch(r"[\x20-\x7e\n]+", text)


def test_it_does_not_overflow_in_half_precision(loaded: tuple[Any, Any]) -> None:
    torch = pytest.importorskip("torch")
    model, tokenizer = loaded
    prompt = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        states = model(**prompt, output_hidden_states=True)
    assert all(state.abs().max().item() < 10_000 for state in (*states.hidden_states, states.logits))
