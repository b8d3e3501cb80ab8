"""The Llama-shaped text decoder: pre-norm blocks of causal self-attention and a gated MLP. Knows no images.

Source: Touvron et al. 2023 (arXiv 2302.13971); transformers `LlamaModel`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxvlm.models.base import Cache, KVSpec, check_numbers
from mlxvlm.models.layers import GatedMLP, join_heads, split_heads
from mlxvlm.models.rope import RoPE, rope_parameters


@dataclass(frozen=True)
class DecoderConfig:
    """A text_config with transformers' LlamaConfig defaults for what it leaves out."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Mapping[str, Any]
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_attention_heads} heads can't share {self.num_key_value_heads} kv heads")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], rms_norm_eps: float = 1e-6) -> DecoderConfig:
        hidden = config.get("hidden_size", 4096)
        heads = config.get("num_attention_heads", 32)
        return cls(
            hidden_size=hidden,
            intermediate_size=config.get("intermediate_size", 11008),
            num_hidden_layers=config.get("num_hidden_layers", 32),
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocab_size=config.get("vocab_size", 32000),
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            rms_norm_eps=config.get("rms_norm_eps", rms_norm_eps),
            rope=rope_parameters({"max_position_embeddings": 2048, **config}),
            hidden_act=config.get("hidden_act", "silu"),
            attention_bias=config.get("attention_bias", False),
            mlp_bias=config.get("mlp_bias", False),
        )

    @property
    def kv_specs(self) -> list[KVSpec]:
        return [KVSpec(self.num_key_value_heads, self.head_dim)] * self.num_hidden_layers


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, config.hidden_size, bias=bias)
        self._heads, self._kv_heads = heads, kv_heads
        self._scale = head_dim**-0.5

    def __call__(self, x: mx.array, rope: RoPE, cache: Cache) -> mx.array:
        queries = split_heads(self.q_proj(x), self._heads)  # [B, H, L, Dh]
        keys = split_heads(self.k_proj(x), self._kv_heads)  # [B, K, L, Dh]
        values = split_heads(self.v_proj(x), self._kv_heads)
        offset = cache.offset
        mixed = cache.attend(rope(queries, offset), rope(keys, offset), values, self._scale)
        return self.o_proj(join_heads(mixed))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act, config.mlp_bias)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, rope: RoPE, cache: Cache) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embeddings in, normed hidden states out; the lm_head is the family's, and so may the layers be."""

    def __init__(
        self, config: DecoderConfig, layers: Sequence[nn.Module] | None = None, interleaved: bool = False
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = list(layers or (DecoderLayer(config) for _ in range(config.num_hidden_layers)))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self._rope = RoPE(config.head_dim, config.rope, interleaved)

    def embed(self, token_ids: mx.array) -> mx.array:
        """[B, L] -> [B, L, D]."""
        # Embeddings quantised in mxfp4, mxfp8 or nvfp4 answer in bfloat16, whatever the rest computes in.
        return self.embed_tokens(token_ids).astype(self.norm.weight.dtype)

    def __call__(self, embeds: mx.array, cache: Sequence[Cache]) -> mx.array:
        x = embeds  # [B, L, D]
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, self._rope, layer_cache)
        return self.norm(x)
