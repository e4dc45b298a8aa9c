from __future__ import annotations

import pytest

from polyphase.advisor.catalog import accelerator_from_text, model_from_text, shipped_library
from polyphase.advisor.model_config import shape_from_config
from polyphase.advisor.precision import parse_precision
from polyphase.advisor.shapes import AttentionKind
from polyphase.core.errors import ConfigurationError

LIBRARY = shipped_library()


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [  # as their makers publish them
        ("llama-3.1-8b", 8.0, 7.5),
        ("llama-3.1-70b", 70.6, 69.5),
        ("llama-3.1-405b", 405.8, 403.7),
        ("qwen3-32b", 32.8, 32.0),
        ("qwen3-235b-a22b", 235.0, 21.5),
        ("deepseek-v3", 671.0, 36.5),
        ("deepseek-v2", 236.0, 21.0),
        ("kimi-k2", 1026.0, 31.5),
        ("gpt-oss-120b", 116.8, 5.1),
        ("gpt-oss-20b", 20.9, 3.6),
        ("glm-4.5", 353.0, 32.0),
        ("glm-5", 744.0, 40.0),
        ("minimax-m2", 229.0, 10.0),
        ("mixtral-8x7b", 46.7, 12.7),
        ("qwen3.5-397b-a17b", 397.0, 16.5),
    ],
)
def test_parameters_are_those_published(name: str, billions: float, active: float) -> None:
    shape = LIBRARY.model(name)
    assert shape.parameter_count / 1e9 == pytest.approx(billions, rel=0.01)
    assert shape.active_parameters / 1e9 == pytest.approx(active, rel=0.04)


def test_latent_attention_caches_one_vector_for_all_heads() -> None:
    attention = LIBRARY.model("deepseek-v3").attention
    assert attention.kind is AttentionKind.LATENT
    assert attention.cached_numbers == 512 + 64


def test_windowed_and_linear_layers_are_counted_apart() -> None:
    windowed, linear = LIBRARY.model("gpt-oss-120b"), LIBRARY.model("qwen3.5-397b-a17b")
    assert (windowed.full_layer_count, windowed.windowed_layer_count, windowed.window_tokens) == (18, 18, 128)
    assert (linear.full_layer_count, linear.linear_layer_count) == (15, 45)


def test_a_model_is_found_by_its_name_on_the_hub_in_any_case() -> None:
    assert LIBRARY.model("DEEPSEEK-AI/deepseek-v3").name == "deepseek-v3"


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("acme/DeepSeek-R1-0528-FP4-v2", "deepseek-r1"),
        ("nvidia/Llama-3.3-70B-Instruct-NVFP4", "llama-3.3-70b"),
        ("zai-org/GLM-5-NVFP4", "glm-5"),
    ],
)
def test_variants_are_as_large_as_their_model(variant: str, name: str) -> None:
    assert LIBRARY.model(variant).name == name


def test_a_vision_model_is_read_through_its_text_part() -> None:
    inner = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100, "intermediate_size": 128}
    assert shape_from_config({"vision_config": {}, "text_config": inner}, "seeing").layer_count == 2


@pytest.mark.parametrize("missing", ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "intermediate_size"])
def test_a_missing_key_is_named(missing: str) -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100, "intermediate_size": 128}
    with pytest.raises(ConfigurationError, match=f"tiny lacks {missing}"):
        shape_from_config({key: value for key, value in config.items() if key != missing}, "tiny")


def test_a_value_that_is_no_count_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="num_hidden_layers = 'many', which is no count"):
        shape_from_config({"num_hidden_layers": "many"}, "tiny")


def test_files_of_users() -> None:
    config = '{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100, "intermediate_size": 128}'
    assert model_from_text(config, "config.json", "own").name == "own"
    assert model_from_text(f'{{"name": "theirs", "config": {config}}}', "theirs.json", "own").name == "theirs"
    sheet = 'name = "tpu"\nmemory_gb = 96\nmemory_tb_s = 2.7\nbf16_tflops = 459\nlink_gb_s = 100\ndomain_gpus = 256\n'
    assert accelerator_from_text(sheet, "tpu.toml").memory_bytes == 96e9


@pytest.mark.parametrize(
    ("sheet", "message"),
    [
        ('name = "x"', "lacks memory_gb"),
        ('name = "x"\nmemory_gb = "big"\nmemory_tb_s = 1\nbf16_tflops = 1\nlink_gb_s = 1\ndomain_gpus = 1', "memory_gb must be a number"),
        ('name = "x"\nmemory_gbs = 1', "unknown key 'memory_gbs'"),
        ("name =", "not valid TOML"),
    ],
)
def test_a_wrong_datasheet_says_what_is_wrong(sheet: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        accelerator_from_text(sheet, "x.toml")


def test_unknown_names_come_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=r"no model 'lama-3.1-70b'; did you mean llama-3.1-70b"):
        LIBRARY.model("lama-3.1-70b")
    with pytest.raises(ConfigurationError, match="no accelerator 'h20'; did you mean h200"):
        LIBRARY.accelerator("h20")
    with pytest.raises(ConfigurationError, match="no precision 'fp7'"):
        parse_precision("fp7")
