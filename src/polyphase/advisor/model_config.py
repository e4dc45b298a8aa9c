"""From a `config.json`, as published with a model, to its shape. The keys are those of Hugging Face's transformers, with the variants in
use.

Whatever the file leaves out and cannot be concluded is an error that names the key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from polyphase.advisor.shapes import AttentionKind, AttentionShape, ExpertShape, LinearAttentionShape, ModelShape
from polyphase.core.errors import ConfigurationError

Config = Mapping[str, object]
_GREATEST = 10**9  # of any count


def shape_from_config(config: Config, name: str) -> ModelShape:
    """`name` names the model in errors and results. Configurations of vision models are followed into `text_config`.

    Raises: ConfigurationError: a key is missing, or no count.
    """
    reader = _Reader(_text_config(config), name)
    layers = reader.count("num_hidden_layers", "n_layer", "num_layers")
    hidden = reader.count("hidden_size", "n_embd", "d_model")
    attention = _latent_attention(reader) if reader.has("kv_lora_rank") else _grouped_attention(reader, hidden)
    kinds = _layer_kinds(reader, layers)
    experts = _experts(reader)
    dense_layers = _dense_layer_count(reader, layers) if experts else layers
    return ModelShape(
        name=name,
        hidden_size=hidden,
        vocabulary_size=reader.count("vocab_size"),
        attention=attention,
        full_layer_count=kinds["full"],
        windowed_layer_count=kinds["windowed"],
        window_tokens=reader.count("sliding_window", "window_size") if kinds["windowed"] else 0,
        linear=_linear_attention(reader) if kinds["linear"] else None,
        linear_layer_count=kinds["linear"],
        dense_layer_count=dense_layers,
        dense_intermediate_size=_dense_intermediate(reader, experts is not None) if dense_layers else 0,
        experts=experts,
        expert_layer_count=layers - dense_layers,
        mtp_layer_count=reader.optional("num_nextn_predict_layers", "num_mtp_modules", "mtp_num_hidden_layers"),
        has_tied_embeddings=bool(reader.config.get("tie_word_embeddings", False)),
        context_length=reader.optional("max_position_embeddings", "n_positions") or 131_072,
        native_precision=_native_precision(config),
        family=str(reader.config.get("model_type", "")),
    )


class _Reader:
    def __init__(self, config: Config, name: str) -> None:
        self.config, self.name = config, name

    def has(self, key: str) -> bool:
        return self.config.get(key) is not None

    def count(self, *keys: str) -> int:
        """Of what there must be at least one."""
        for key in keys:
            if self.has(key):
                return self._checked(key, least=1)
        others = f" (or {', '.join(keys[1:])})" if len(keys) > 1 else ""
        raise ConfigurationError(f"the configuration of {self.name} lacks {keys[0]}{others}, so the model's size cannot be told")

    def optional(self, *keys: str, default: int = 0) -> int:
        return next((self._checked(key) for key in keys if self.has(key)), default)

    def _checked(self, key: str, least: int = 0) -> int:
        value = self.config[key]
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= _GREATEST or value != int(value):
            raise ConfigurationError(f"the configuration of {self.name} has {key} = {value!r}, which is no count")
        return int(value)


def _text_config(config: Config) -> Config:
    for key in ("text_config", "llm_config", "language_config"):
        inner = config.get(key)
        if isinstance(inner, Mapping) and "num_hidden_layers" in inner:
            return inner
    return config


def _grouped_attention(reader: _Reader, hidden: int) -> AttentionShape:
    heads = reader.count("num_attention_heads", "n_head")
    head_dim = reader.optional("head_dim") or hidden // heads
    if head_dim == 0:
        raise ConfigurationError(f"the configuration of {reader.name} has more attention heads ({heads}) than hidden_size ({hidden})")
    return AttentionShape(
        kind=AttentionKind.GROUPED,
        query_head_count=heads,
        kv_head_count=reader.optional("num_key_value_heads", "num_kv_heads") or heads,
        head_dim=head_dim,
        value_dim=head_dim,
        is_gated=bool(reader.config.get("attn_output_gate", False)),
    )


def _latent_attention(reader: _Reader) -> AttentionShape:
    rope = reader.count("qk_rope_head_dim")
    return AttentionShape(
        kind=AttentionKind.LATENT,
        query_head_count=reader.count("num_attention_heads"),
        kv_head_count=1,
        head_dim=reader.count("qk_nope_head_dim") + rope,
        value_dim=reader.count("v_head_dim"),
        query_rank=reader.optional("q_lora_rank"),
        latent_dim=reader.count("kv_lora_rank"),
        rope_dim=rope,
        top_tokens=reader.optional("index_topk"),
        index_dim=reader.optional("index_head_dim"),
        index_head_count=reader.optional("index_n_heads"),
    )


def _linear_attention(reader: _Reader) -> LinearAttentionShape:
    return LinearAttentionShape(
        key_head_count=reader.count("linear_num_key_heads"),
        value_head_count=reader.count("linear_num_value_heads"),
        key_dim=reader.count("linear_key_head_dim"),
        value_dim=reader.count("linear_value_head_dim"),
    )


def _layer_kinds(reader: _Reader, layers: int) -> dict[str, int]:
    kinds = {"full": layers, "windowed": 0, "linear": 0}
    listed = reader.config.get("layer_types")
    if isinstance(listed, Sequence) and not isinstance(listed, str) and len(listed) == layers:
        kinds = {"full": 0, "windowed": 0, "linear": 0}
        for entry in listed:
            text = str(entry)
            kinds["windowed" if "sliding" in text else "linear" if "linear" in text else "full"] += 1
    elif every := reader.optional("full_attention_interval"):
        kinds = {"full": layers // every, "windowed": 0, "linear": layers - layers // every}
    elif reader.has("sliding_window") and reader.config.get("use_sliding_window", True):
        every = reader.optional("sliding_window_pattern", default=0)
        full = layers // every if every else 0
        kinds = {"full": full, "windowed": layers - full, "linear": 0}
    return kinds


def _experts(reader: _Reader) -> ExpertShape | None:
    count = reader.optional("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
    if count <= 1:
        return None
    size = reader.count("moe_intermediate_size", "expert_hidden_dim", "intermediate_size")
    shared = reader.optional("shared_expert_intermediate_size", "shared_intermediate_size")
    return ExpertShape(
        expert_count=count,
        active_count=reader.count("num_experts_per_tok", "experts_per_token", "moe_top_k", "num_experts_per_token"),
        intermediate_size=size,
        shared_intermediate_size=shared or size * reader.optional("n_shared_experts", "num_shared_experts"),
    )


def _dense_layer_count(reader: _Reader, layers: int) -> int:
    first = reader.optional("first_k_dense_replace", "moe_layer_start_index")
    step = reader.optional("moe_layer_freq", "decoder_sparse_step", "interleave_moe_layer_step", default=1) or 1
    listed = reader.config.get("mlp_only_layers")
    alone = len(listed) if isinstance(listed, Sequence) and not isinstance(listed, str) else 0
    sparse = (layers - first) // step
    return min(layers, layers - sparse + alone)


def _dense_intermediate(reader: _Reader, is_mixture: bool) -> int:
    if is_mixture and not reader.has("moe_intermediate_size"):
        return reader.count("mlp_intermediate_size", "intermediate_size_mlp", "intermediate_size")
    return reader.count("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")


def _native_precision(config: Config) -> str:
    quantisation = config.get("quantization_config") or _text_config(config).get("quantization_config")
    if not isinstance(quantisation, Mapping):
        return "bf16"
    method = str(quantisation.get("quant_method", "")).lower()
    text = f"{method} {quantisation.get('quant_algo', '')} {quantisation.get('format', '')}".lower()
    if "mxfp4" in text:
        return "bf16+mxfp4"
    if "fp4" in text:
        return "nvfp4"
    if "fp8" in text:
        return "fp8_block" if quantisation.get("weight_block_size") else "fp8"
    if any(word in text for word in ("awq", "gptq", "int4", "pack-quantized")):
        return "int4_wo"
    return "bf16"
