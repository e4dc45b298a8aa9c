"""What a model costs, as numbers: layers, attention, experts. Read from a `config.json` by `model_config`, used by `counts`."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class AttentionKind(enum.StrEnum):
    GROUPED = "grouped"  # multi-head and multi-query attention are its extremes
    LATENT = "latent"  # DeepSeek's MLA: one compressed vector per token, the same for all heads


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One layer's attention.

    For latent attention `kv_head_count` is 1, `head_dim` what a query is compared in (nope + rope), and the cache holds
    `latent_dim + rope_dim` numbers a token. Source: DeepSeek-V2, arXiv 2405.04434.
    """

    kind: AttentionKind
    query_head_count: int
    kv_head_count: int
    head_dim: int
    value_dim: int
    query_rank: int = 0  # 0: the query is not compressed
    latent_dim: int = 0
    rope_dim: int = 0
    is_gated: bool = False  # an output gate as wide as the queries (Qwen3-Next, Qwen3.5)
    top_tokens: int = 0  # sparse attention (DeepSeek-V3.2, GLM-5): tokens read; 0: all
    index_dim: int = 0  # of the indexer's key per token
    index_head_count: int = 0

    @property
    def cached_numbers(self) -> int:
        """Numbers that the KV cache holds for one token in one layer, all heads; the indexer's key apart."""
        if self.kind is AttentionKind.LATENT:
            return self.latent_dim + self.rope_dim
        return self.kv_head_count * (self.head_dim + self.value_dim)

    @property
    def flops_per_pair(self) -> int:
        """Of one token against one token in the cache, all heads. Latent attention in its absorbed form, as decode runs it."""
        if self.kind is AttentionKind.LATENT:
            return 2 * self.query_head_count * (2 * self.latent_dim + self.rope_dim)
        return 2 * self.query_head_count * (self.head_dim + self.value_dim)

    @property
    def prefill_flops_per_pair(self) -> int:
        """The same for prefill, where latent attention is expanded to ordinary heads."""
        return 2 * self.query_head_count * (self.head_dim + self.value_dim)


@dataclass(frozen=True, slots=True)
class LinearAttentionShape:
    """A layer with a state of fixed size instead of a cache (Gated DeltaNet of Qwen3-Next and Qwen3.5)."""

    key_head_count: int
    value_head_count: int
    key_dim: int
    value_dim: int

    @property
    def state_numbers(self) -> int:
        return self.value_head_count * self.key_dim * self.value_dim

    def parameter_count(self, hidden_size: int) -> int:
        keys, values = self.key_head_count * self.key_dim, self.value_head_count * self.value_dim
        return hidden_size * (2 * keys + 2 * values) + values * hidden_size


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The routed and shared experts of one layer."""

    expert_count: int
    active_count: int  # routed experts per token
    intermediate_size: int
    shared_intermediate_size: int  # 0: no shared expert

    def parameter_count(self, hidden_size: int) -> int:
        """Of one routed expert: gate, up, down."""
        return 3 * hidden_size * self.intermediate_size


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder. Layers are counted, not ordered: `full + windowed + linear` attention layers, `dense + expert` feed-forward layers."""

    name: str
    hidden_size: int
    vocabulary_size: int
    attention: AttentionShape
    full_layer_count: int
    windowed_layer_count: int = 0
    window_tokens: int = 0
    linear: LinearAttentionShape | None = None
    linear_layer_count: int = 0
    dense_layer_count: int = 0
    dense_intermediate_size: int = 0
    experts: ExpertShape | None = None
    expert_layer_count: int = 0
    mtp_layer_count: int = 0  # layers that predict further tokens
    has_tied_embeddings: bool = False
    context_length: int = 131_072
    native_precision: str = "bf16"  # of the published weights
    family: str = ""

    @property
    def layer_count(self) -> int:
        return self.full_layer_count + self.windowed_layer_count + self.linear_layer_count

    @property
    def is_mixture(self) -> bool:
        return self.experts is not None

    @property
    def attention_parameters(self) -> int:
        """Of one layer with a KV cache: the projections."""
        a, hidden = self.attention, self.hidden_size
        out = a.query_head_count * a.value_dim * hidden
        if a.kind is AttentionKind.LATENT:
            queries = a.query_head_count * a.head_dim
            query = a.query_rank * (hidden + queries) if a.query_rank else hidden * queries
            compress = hidden * (a.latent_dim + a.rope_dim)
            expand = a.latent_dim * a.query_head_count * (a.head_dim - a.rope_dim + a.value_dim)
            indexer = a.index_head_count * a.index_dim * (a.query_rank or hidden) + a.index_dim * hidden
            return query + compress + expand + out + indexer
        queries = a.query_head_count * a.head_dim * (2 if a.is_gated else 1)
        return hidden * queries + hidden * a.kv_head_count * (a.head_dim + a.value_dim) + out

    @property
    def dense_parameters(self) -> int:
        """Everything that each token passes, output layer included; embedding table and routed experts not."""
        with_cache = self.full_layer_count + self.windowed_layer_count
        attention = with_cache * self.attention_parameters
        if self.linear:
            attention += self.linear_layer_count * self.linear.parameter_count(self.hidden_size)
        feed_forward = self.dense_layer_count * 3 * self.hidden_size * self.dense_intermediate_size
        shared = self.expert_layer_count * 3 * self.hidden_size * self.experts.shared_intermediate_size if self.experts else 0
        return attention + feed_forward + shared + self.output_parameters

    @property
    def output_parameters(self) -> int:
        return self.vocabulary_size * self.hidden_size

    @property
    def routed_parameters(self) -> int:
        if not self.experts:
            return 0
        return self.expert_layer_count * self.experts.expert_count * self.experts.parameter_count(self.hidden_size)

    @property
    def embedding_parameters(self) -> int:
        return 0 if self.has_tied_embeddings else self.output_parameters

    @property
    def parameter_count(self) -> int:
        """All, without the layers that predict further tokens and without norms and biases (under 0.1 %)."""
        return self.dense_parameters + self.routed_parameters + self.embedding_parameters

    @property
    def active_parameters(self) -> int:
        """What one token passes."""
        if not self.experts:
            return self.dense_parameters
        routed = self.expert_layer_count * self.experts.active_count * self.experts.parameter_count(self.hidden_size)
        return self.dense_parameters + routed
