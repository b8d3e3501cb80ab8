"""Llama 4: a vision transformer with two-dimensional RoPE, pixel shuffle, and a decoder of mixtures of experts.

Source: transformers `Llama4ForConditionalGeneration` (Scout, Maverick).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlxvlm.models.base import (
    Cache,
    KVSpec,
    QuantPaths,
    check_numbers,
)
from mlxvlm.models.decoder import Attention, Decoder, DecoderConfig, DecoderModel
from mlxvlm.models.experts import Experts
from mlxvlm.models.layers import GatedMLP, join_heads, split_heads, unshared
from mlxvlm.models.rope import Rotation, inverse_frequencies, rope_parameters
from mlxvlm.models.vit import VisionMLP, attend, pixel_shuffle
from mlxvlm.processors.base import PreparedImage

_LAYER_NORM_EPS = 1e-5  # the reference ignores vision_config.norm_eps
_VISION_ACT = "gelu"  # and vision_config.hidden_act


@dataclass(frozen=True)
class VisionConfig:
    """vision_config with transformers' Llama4VisionConfig defaults."""

    hidden_size: int = 768
    intermediate_size: int = 5632
    num_hidden_layers: int = 34
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 448
    patch_size: int = 14
    pixel_shuffle_ratio: float = 0.5
    projector_input_dim: int = 4096
    projector_output_dim: int = 4096
    vision_output_dim: int = 7680
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(f"{self.num_attention_heads} heads of width {self.hidden_size} have no pairs for two axes")
        if self.grid % self.scale or self.pixel_shuffle_ratio * self.scale != 1:
            raise ValueError(f"{self.grid} patches a side can't be shuffled by {self.pixel_shuffle_ratio}")
        if self.hidden_size * self.scale**2 != self.intermediate_size:
            raise ValueError(f"shuffled patches don't have intermediate_size {self.intermediate_size}")
        if not self.projector_input_dim == self.projector_output_dim == self.vision_output_dim:
            raise ValueError("projector_input_dim, projector_output_dim and vision_output_dim differ")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VisionConfig:
        given = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
        return cls(**{**given, "rope_theta": rope_parameters(config)["rope_theta"]})

    @property
    def grid(self) -> int:
        """Patches a side; pixels beyond the last whole patch are not seen."""
        return self.image_size // self.patch_size

    @property
    def scale(self) -> int:
        """Patches that become one feature, a side."""
        return round(1 / self.pixel_shuffle_ratio)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


_TEXT_DEFAULTS: dict[str, Any] = {
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 202048,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}


@dataclass(frozen=True, kw_only=True)
class TextConfig(DecoderConfig):
    """text_config with transformers' Llama4TextConfig defaults; tuples have an entry for each layer."""

    intermediate_size_mlp: int  # of dense layers; intermediate_size is an expert's
    num_local_experts: int
    num_experts_per_tok: int
    attention_chunk_size: int
    floor_scale: int
    attn_scale: float
    use_qk_norm: bool
    tunes_temperature: bool
    has_rope: tuple[bool, ...]
    has_experts: tuple[bool, ...]
    is_chunked: tuple[bool, ...]

    def __post_init__(self) -> None:
        DecoderConfig.__post_init__(self)
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(f"{self.num_experts_per_tok} of {self.num_local_experts} experts can't be chosen")
        for name in ("has_rope", "has_experts", "is_chunked"):
            if len(getattr(self, name)) != self.num_hidden_layers:
                raise ValueError(f"{name} has no entry for each of {self.num_hidden_layers} layers")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], rms_norm_eps: float = 1e-5) -> TextConfig:
        base = DecoderConfig.from_dict({**_TEXT_DEFAULTS, **config})
        layers = range(base.num_hidden_layers)
        interval, step = config.get("no_rope_layer_interval", 4), config.get("interleave_moe_layer_step", 1)
        # An empty list means the default too: Scout's config has one. 1 stands for a layer WITH positions.
        has_rope = config.get("no_rope_layers") or [(layer + 1) % interval for layer in layers]
        moe_layers = config.get("moe_layers")
        if moe_layers is None:
            moe_layers = range(step - 1, base.num_hidden_layers, step)
        types = config.get("layer_types") or ["chunked_attention" if rope else "full_attention" for rope in has_rope]
        return cls(
            **vars(base),
            intermediate_size_mlp=config.get("intermediate_size_mlp", 16384),
            num_local_experts=config.get("num_local_experts", 16),
            num_experts_per_tok=config.get("num_experts_per_tok", 1),
            attention_chunk_size=config.get("attention_chunk_size", 8192),
            floor_scale=config.get("floor_scale", 8192),
            attn_scale=config.get("attn_scale", 0.1),
            use_qk_norm=config.get("use_qk_norm", True),
            tunes_temperature=bool(config.get("attn_temperature_tuning", True)),
            has_rope=tuple(bool(rope) for rope in has_rope[: len(layers)]),
            has_experts=tuple(layer in moe_layers for layer in layers),
            is_chunked=tuple(kind == "chunked_attention" for kind in types[: len(layers)]),
        )

    @property
    def kv_specs(self) -> list[KVSpec]:
        heads, head_dim, chunk = self.num_key_value_heads, self.head_dim, self.attention_chunk_size
        return [KVSpec(heads, head_dim, chunk=chunk if chunked else None) for chunked in self.is_chunked]


@dataclass(frozen=True)
class Config:
    """config.json."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int

    def __post_init__(self) -> None:
        check_numbers(self)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config:
        return cls(
            text=TextConfig.from_dict(config.get("text_config") or {}),
            vision=VisionConfig.from_dict(config.get("vision_config") or {}),
            image_token_id=config.get("image_token_index", config.get("image_token_id", 200092)),
        )


def vision_rotations(config: VisionConfig) -> tuple[mx.array, mx.array]:
    """cos and sin, float32 [P + 1, Dh / 2]: the first half of the pairs turns by x + 1, the second by y + 1.

    The class token, last, is not turned. Source: `Llama4VisionRotaryEmbedding`.
    """
    frequencies = inverse_frequencies(
        config.head_dim // 2, {"rope_type": "default", "rope_theta": config.rope_theta}
    )  # [Dh / 4]
    ones: NDArray[np.float32] = np.arange(1, config.grid + 1, dtype=np.float32)
    x, y = np.tile(ones, config.grid), np.repeat(ones, config.grid)  # [P]
    angles = np.concatenate([x[:, None] * frequencies, y[:, None] * frequencies], axis=1)
    angles = np.concatenate([angles, np.zeros_like(angles[:1])])
    return mx.array(np.cos(angles)), mx.array(np.sin(angles))


def rotate_pairs(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """[F, H, L, Dh] with pairs (2j, 2j + 1) turned by angle j; float32 inside, as in the reference."""
    pairs = x.astype(mx.float32).reshape(*x.shape[:-1], -1, 2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = mx.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


class VisionAttention(nn.Module):
    """Attention over all patches of one tile and its class token."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dims = config.hidden_size
        self.q_proj = nn.Linear(dims, dims)
        self.k_proj = nn.Linear(dims, dims)
        self.v_proj = nn.Linear(dims, dims)
        self.o_proj = nn.Linear(dims, dims)
        self._heads = config.num_attention_heads

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        queries, keys, values = (
            split_heads(projection(x), self._heads) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [F, H, P + 1, Dh]
        return self.o_proj(join_heads(attend(rotate_pairs(queries, cos, sin), rotate_pairs(keys, cos, sin), values)))


class VisionLayer(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config.hidden_size, config.intermediate_size, _VISION_ACT)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=_LAYER_NORM_EPS)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=_LAYER_NORM_EPS)

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class VisionEncoder(nn.Module):
    """The stack of layers, named as in the checkpoint."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = [VisionLayer(config) for _ in range(config.num_hidden_layers)]


class PatchEmbedding(nn.Module):
    """A linear layer over patches flattened channel by channel, row by row."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size, bias=False)
        self._grid, self._patch = config.grid, config.patch_size

    def __call__(self, pixels: mx.array) -> mx.array:
        return self.linear(self.cut(pixels))

    def cut(self, pixels: mx.array) -> mx.array:
        """[F, C, H, W] -> [F, P, C * p * p]."""
        frames, channels = pixels.shape[:2]
        grid, patch = self._grid, self._patch
        cells = pixels[..., : grid * patch, : grid * patch].reshape(frames, channels, grid, patch, grid, patch)
        return cells.transpose(0, 2, 4, 1, 3, 5).reshape(frames, grid * grid, -1)


class AdapterMLP(nn.Module):
    """gelu(fc2(gelu(fc1(x)))): the activation follows the second layer too."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.intermediate_size, config.projector_input_dim, bias=False)
        self.fc2 = nn.Linear(config.projector_output_dim, config.projector_output_dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return nn.gelu(self.fc2(nn.gelu(self.fc1(x))))


class VisionAdapter(nn.Module):
    """Pixel shuffle, then the MLP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.mlp = AdapterMLP(config)
        self._scale = config.scale

    def __call__(self, x: mx.array) -> mx.array:
        return self.mlp(pixel_shuffle(x, self._scale))


class VisionModel(nn.Module):
    """The tower: patches, learned and rotary positions, a class token that is dropped at the end, the adapter."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(config)
        self.class_embedding = mx.zeros((config.hidden_size,))
        self.positional_embedding_vlm = mx.zeros((config.grid**2 + 1, config.hidden_size))
        self.layernorm_pre = nn.LayerNorm(config.hidden_size, eps=_LAYER_NORM_EPS)
        self.model = VisionEncoder(config)
        self.layernorm_post = nn.LayerNorm(config.hidden_size, eps=_LAYER_NORM_EPS)
        self.vision_adapter = VisionAdapter(config)
        self._rotations = vision_rotations(config)

    def __call__(self, pixels: mx.array) -> mx.array:
        patches = self.patch_embedding(pixels)  # [F, C, H, W] -> [F, P, D]
        last = mx.broadcast_to(self.class_embedding, (len(patches), 1, patches.shape[-1]))
        x = self.layernorm_pre(mx.concatenate([patches, last], axis=1) + self.positional_embedding_vlm)
        for layer in self.model.layers:
            x = layer(x, *self._rotations)
        return self.vision_adapter(self.layernorm_post(x)[:, :-1])  # [F, N, D]


class Projector(nn.Module):
    """One linear layer, named as in the checkpoint."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.vision.vision_output_dim, config.text.hidden_size, bias=False)


class TextAttention(Attention):
    """Interleaved RoPE, then norms without weights; layers without positions are sharpened with distance instead.

    Source: `Llama4TextAttention`; the temperature is that of Nakanishi 2025 (arXiv 2501.19399).
    """

    def __init__(self, config: TextConfig, has_rope: bool) -> None:
        super().__init__(config)
        self._has_rope = has_rope
        self._norm_eps = config.rms_norm_eps if config.use_qk_norm and has_rope else None
        self._tunes_temperature = config.tunes_temperature and not has_rope

    def __call__(self, x: mx.array, rotate: Rotation, cache: Cache, temperature: mx.array | None = None) -> mx.array:
        """temperature [B or 1, 1, L, 1] is for queries without positions."""
        queries = split_heads(self.q_proj(x), self._heads)  # [B, H, L, Dh]
        keys = split_heads(self.k_proj(x), self._kv_heads)  # [B, K, L, Dh]
        values = split_heads(self.v_proj(x), self._kv_heads)
        if self._has_rope:
            queries, keys = rotate(queries), rotate(keys)
        if self._norm_eps is not None:
            queries, keys = (mx.fast.rms_norm(heads, None, self._norm_eps) for heads in (queries, keys))
        if self._tunes_temperature and temperature is not None:
            queries = (queries * temperature).astype(queries.dtype)
        return self._sum(self.o_proj(join_heads(cache.attend(queries, keys, values, self._scale))))


class MixtureOfExperts(nn.Module):
    """A shared expert plus the chosen ones, whose INPUT is scaled by the router. Source: `Llama4TextMoe`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        dims, hidden_dims, act = config.hidden_size, config.intermediate_size, config.hidden_act
        self.experts = Experts(config.num_local_experts, dims, hidden_dims, act)
        self.router = nn.Linear(dims, config.num_local_experts, bias=False)
        self.shared_expert = GatedMLP(dims, hidden_dims, act)
        self._chosen = config.num_experts_per_tok
        self._sum = unshared

    def __call__(self, x: mx.array) -> mx.array:
        count, dims = self._chosen, x.shape[-1]
        logits = self.router(x)  # [B, L, E]
        experts = mx.argpartition(-logits, count - 1, axis=-1)[..., :count]
        chosen = mx.take_along_axis(logits, experts, axis=-1)
        scores = mx.sigmoid(chosen.astype(mx.float32)).astype(x.dtype)  # [B, L, k], each on its own
        scaled = x[..., None, :] * scores[..., None]  # [B, L, k, D]
        routed = self.experts(scaled.reshape(-1, dims), experts.reshape(-1)).reshape(scaled.shape)
        return self._sum(self.shared_expert(x) + routed.sum(axis=-2))


class TextLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), dense or a mixture."""

    def __init__(self, config: TextConfig, index: int) -> None:
        super().__init__()
        self.self_attn = TextAttention(config, config.has_rope[index])
        if config.has_experts[index]:
            self.feed_forward: nn.Module = MixtureOfExperts(config)
        else:
            self.feed_forward = GatedMLP(config.hidden_size, config.intermediate_size_mlp, config.hidden_act)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, rotate: Rotation, cache: Cache, temperature: mx.array) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), rotate, cache, temperature)
        return x + self.feed_forward(self.post_attention_layernorm(x))


class TextModel(Decoder):
    """The trunk, under the checkpoint's `language_model.model`."""

    def __init__(self, config: TextConfig) -> None:
        layers = [TextLayer(config, index) for index in range(config.num_hidden_layers)]
        super().__init__(config, layers, interleaved=True)
        self._floor_scale, self._attn_scale = config.floor_scale, config.attn_scale

    def temperature(self, offset: int | mx.array, length: int) -> mx.array:
        """float32 [B or 1, 1, L, 1]: what queries are multiplied by, from each row's own positions."""
        starts = mx.array(offset).reshape(-1, 1)
        positions = (starts + mx.arange(length)).astype(mx.float32)[:, None, :, None]
        return mx.log1p(mx.floor((positions + 1) / self._floor_scale)) * self._attn_scale + 1

    def __call__(self, embeds: mx.array, cache: Sequence[Cache], rotate: Rotation | None = None) -> mx.array:
        x, offset = embeds, cache[0].offset  # [B, L, D]
        rotate, temperature = rotate or self._rope.at(offset), self.temperature(offset, embeds.shape[1])
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, rotate, layer_cache, temperature)
        return self.norm(x)


class LanguageModel(nn.Module):
    """The decoder and its head, named as in the checkpoint."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.model = TextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class Model(DecoderModel):
    """A VisionLanguageModel."""

    quant_paths = QuantPaths(
        decoder="language_model.model",
        head="language_model.lm_head",
        tower="vision_model.model.layers",
    )

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.vision_model = VisionModel(config.vision)
        self.multi_modal_projector = Projector(config)
        self.language_model = LanguageModel(config.text)
        self._config = config

    @property
    def decoder(self) -> Decoder:
        return self.language_model.model

    @property
    def head(self) -> nn.Module | None:
        return self.language_model.lm_head

    def encode_images(self, images: Sequence[PreparedImage]) -> list[mx.array]:
        """[tiles, 3, side, side] pixels of each image -> [tiles * tokens a tile, D]."""
        counts = [len(image.pixels) for image in images]
        tiles = mx.array(np.concatenate([image.pixels for image in images]))
        tower = self.vision_model
        features = self.multi_modal_projector.linear_1(tower(tiles.astype(tower.layernorm_post.weight.dtype)))
        pieces = mx.split(features, np.cumsum(counts)[:-1].tolist())
        return [piece.reshape(-1, piece.shape[-1]) for piece in pieces]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """All layouts have our names, but for the experts: see _split_experts."""
        ours: dict[str, mx.array] = {}
        for name, array in weights.items():
            if not name.endswith(_BUFFERS):
                ours |= _split_experts(name, array)
        return ours

    def published(self, name: str, array: mx.array) -> tuple[str, mx.array]:
        return name, array


# Values that old releases stored and every release recomputes.
_BUFFERS = ("rotary_emb.inv_freq", "rotary_embedding.freqs_ci")
_FUSED = re.compile(r"^(.*\.feed_forward\.experts)\.(gate_up_proj|down_proj)$")


def _split_experts(name: str, array: mx.array) -> dict[str, mx.array]:
    """transformers stores experts as [E, in, out] without `.weight`, gate and up in one; MLX-community has ours."""
    match = _FUSED.match(name)
    if match is None:
        return {name: array}
    path, kind = match.groups()
    names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    # Copied: a view would keep the fused stack alive, and make matrix products copy it at every step.
    parts = mx.split(array.swapaxes(-1, -2), len(names), axis=-2)
    return {f"{path}.{part}.weight": mx.contiguous(stack) for part, stack in zip(names, parts, strict=True)}


def build(config: Mapping[str, Any]) -> Model:
    """The entry that families.py points to."""
    return Model(Config.from_dict(config))
