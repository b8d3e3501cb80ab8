"""The Llama-shaped text decoder: pre-norm blocks of causal self-attention and a gated MLP. Knows no pixels.

Source: Touvron et al. 2023 (arXiv 2302.13971); transformers `LlamaModel`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxvlm.models.base import Cache, Features, Inputs, KVSpec, RowState, check_numbers, images_from, merge_features
from mlxvlm.models.layers import GatedMLP, join_heads, split_heads, unshared
from mlxvlm.models.rope import RoPE, Rotation, rope_parameters
from mlxvlm.processors.base import Prompt


class TextType(NamedTuple):
    """What one text model_type adds to Llama: its class's defaults, and what no config can change."""

    defaults: Mapping[str, Any] = {}
    fixed: Mapping[str, Any] = {}


_LLAMA_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
# Sources: transformers `LlamaConfig`, `MistralConfig`, `Qwen2Config` and the projections of their attention.
TEXT_TYPES: Mapping[str, TextType] = {
    "llama": TextType(fixed={"use_sliding_window": False}),
    "mistral": TextType(
        defaults={
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        fixed={"attention_bias": False, "mlp_bias": False, "use_sliding_window": True, "layer_types": None},
    ),
    "qwen2": TextType(
        defaults={
            "intermediate_size": 22016,
            "num_key_value_heads": 32,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        fixed={"attention_bias": True, "output_bias": False, "mlp_bias": False},
    ),
}


@dataclass(frozen=True)
class DecoderConfig:
    """A text_config with the defaults that transformers has for its model_type; Llama's for any other."""

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
    attention_bias: bool = False  # of q, k and v
    output_bias: bool = False  # of o
    mlp_bias: bool = False
    windows: tuple[int | None, ...] = ()  # of each layer; none given: all layers see everything

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_attention_heads} heads can't share {self.num_key_value_heads} kv heads")
        if self.windows and len(self.windows) != self.num_hidden_layers:
            raise ValueError(f"layer_types names {len(self.windows)} layers of {self.num_hidden_layers}")
        for window in self.windows:
            if window is not None and window < 1:
                raise ValueError(f"sliding_window {window} is no positive number")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], rms_norm_eps: float = 1e-6) -> DecoderConfig:
        text_type = TEXT_TYPES.get(config.get("model_type", "llama"), TEXT_TYPES["llama"])
        config = {**_LLAMA_DEFAULTS, **text_type.defaults, **config, **text_type.fixed}
        heads, attention_bias = config["num_attention_heads"], config.get("attention_bias", False)
        return cls(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            max_position_embeddings=config["max_position_embeddings"],
            rms_norm_eps=config.get("rms_norm_eps", rms_norm_eps),
            rope=rope_parameters(config),
            hidden_act=config.get("hidden_act", "silu"),
            attention_bias=attention_bias,
            output_bias=config.get("output_bias", attention_bias),
            mlp_bias=config.get("mlp_bias", False),
            windows=_windows(config),
        )

    @property
    def kv_specs(self) -> list[KVSpec]:
        windows = self.windows or (None,) * self.num_hidden_layers
        return [KVSpec(self.num_key_value_heads, self.head_dim, window) for window in windows]


def _windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """How far each layer looks back: by layer_types, else the layers from max_window_layers on have the window."""
    window = config.get("sliding_window") if config.get("use_sliding_window", False) else None
    kinds = config.get("layer_types")
    if kinds is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = config.get("max_window_layers", 0)
    return tuple(window if layer >= first else None for layer in range(config["num_hidden_layers"]))


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, config.hidden_size, bias=config.output_bias)
        self._heads, self._kv_heads = heads, kv_heads
        self._scale = head_dim**-0.5
        self._sum = unshared

    def __call__(self, x: mx.array, rotate: Rotation, cache: Cache) -> mx.array:
        queries = split_heads(self.q_proj(x), self._heads)  # [B, H, L, Dh]
        keys = split_heads(self.k_proj(x), self._kv_heads)  # [B, K, L, Dh]
        values = split_heads(self.v_proj(x), self._kv_heads)
        mixed = cache.attend(rotate(queries), rotate(keys), values, self._scale)
        return self._sum(self.o_proj(join_heads(mixed)))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act, config.mlp_bias)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, rotate: Rotation, cache: Cache) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), rotate, cache)
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

    def __call__(self, embeds: mx.array, cache: Sequence[Cache], rotate: Rotation | None = None) -> mx.array:
        """`rotate`: for a family whose positions are not counted from the cache's offset."""
        if rotate is None:
            rotate = self._rope.at(cache[0].offset)
        x = embeds  # [B, L, D]
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, rotate, layer_cache)
        return self.norm(x)


class DecoderModel(nn.Module):
    """The part of a VisionLanguageModel that is the same wherever features stand in the places of placeholders.

    A family says where its decoder and head are, and has `_config` with `text` and `image_token_id`.
    """

    _config: Any

    @property
    def decoder(self) -> Decoder:
        raise NotImplementedError

    @property
    def head(self) -> nn.Module | None:
        """None where the embeddings serve as head too."""
        raise NotImplementedError

    @property
    def kv_specs(self) -> Sequence[KVSpec]:
        specs: Sequence[KVSpec] = self._config.text.kv_specs
        return specs

    @property
    def vocab_size(self) -> int:
        return int(self._config.text.vocab_size)

    def needed_images(self, prompt: Prompt, start: int) -> Sequence[int]:
        return images_from(prompt, start)

    def embed_prompt(self, prompt: Prompt, features: Features) -> Inputs:
        embeds = self.decoder.embed(mx.array(prompt.token_ids)[None])
        return Inputs(merge_features(embeds, prompt, self._config.image_token_id, features))

    def embed_tokens(self, token_ids: mx.array, rows: Sequence[RowState]) -> Inputs:
        return Inputs(self.decoder.embed(token_ids))

    def __call__(self, inputs: Inputs, cache: Sequence[Cache]) -> mx.array:
        return self.decoder(inputs.embeds, cache)

    def logits(self, hidden: mx.array) -> mx.array:
        head = self.head
        logits: mx.array = self.decoder.embed_tokens.as_linear(hidden) if head is None else head(hidden)
        return logits
