"""Qwen2-VL: a vision transformer with 2-D RoPE on pictures of any shape, and a Qwen2 decoder with M-RoPE.

Sources: Wang et al. 2024 (arXiv 2409.12191); transformers `Qwen2VLForConditionalGeneration`. Pictures only, no videos.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlxvlm.models.base import (
    Cache,
    Features,
    Inputs,
    KVSpec,
    QuantPaths,
    RowState,
    check_numbers,
    merge_features,
    renamed,
)
from mlxvlm.models.decoder import Decoder, DecoderConfig, DecoderModel
from mlxvlm.models.layers import join_heads, split_heads
from mlxvlm.models.rope import MRoPE, Rotation, inverse_frequencies, rope_parameters, rotation
from mlxvlm.models.vit import VisionMLP
from mlxvlm.processors.base import PreparedImage, Prompt

_VISION_EPS = 1e-6  # fixed in the reference, in every layer norm of the tower

# transformers' Qwen2VLTextConfig, where it differs from the decoder's own defaults.
_TEXT_DEFAULTS: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
}
_MROPE_SECTION = (16, 24, 24)


@dataclass(frozen=True)
class VisionConfig:
    """vision_config with transformers' Qwen2VLVisionConfig defaults. `hidden_size` is the decoder's width."""

    depth: int = 32
    embed_dim: int = 1280
    hidden_size: int = 3584
    hidden_act: str = "quick_gelu"
    mlp_ratio: float = 4
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.embed_dim % self.num_heads or self.head_dim % 4:
            raise ValueError(f"vision width {self.embed_dim} can't be split into {self.num_heads} heads with 2-D RoPE")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VisionConfig:
        known = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
        return cls(**{**known, "rope_theta": rope_parameters(config)["rope_theta"]})

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def patch_shape(self) -> tuple[int, int, int, int]:
        """(C, T, y, x) of what one patch's projection reads."""
        return self.in_channels, self.temporal_patch_size, self.patch_size, self.patch_size


@dataclass(frozen=True)
class Config:
    """config.json: the flat ones of 2024, and transformers 5's with a text_config."""

    text: DecoderConfig
    vision: VisionConfig
    mrope_section: tuple[int, ...]
    windows: tuple[int | None, ...]  # of each decoder layer
    image_token_id: int
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.vision.hidden_size != self.text.hidden_size:
            raise ValueError(f"vision gives {self.vision.hidden_size} features, the text has {self.text.hidden_size}")
        if len(self.windows) != self.text.num_hidden_layers:
            raise ValueError(f"{len(self.windows)} layer_types for {self.text.num_hidden_layers} layers")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config:
        text = {**_TEXT_DEFAULTS, **(config.get("text_config") or config)}
        # The section alone tells M-RoPE: resaved configs call its type "default".
        scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
        decoder = DecoderConfig.from_dict(text)
        return cls(
            text=replace(decoder, attention_bias=True, output_bias=False),  # no key says so
            vision=VisionConfig.from_dict(config.get("vision_config") or {}),
            mrope_section=tuple(scaling.get("mrope_section") or _MROPE_SECTION),
            windows=_windows(text, decoder.num_hidden_layers),
            image_token_id=config.get("image_token_id", 151655),
            tie_word_embeddings=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        )


def _windows(text: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """How far back each layer sees. A sliding_window means nothing unless use_sliding_window is set."""
    window = text.get("sliding_window", 4096) if text.get("use_sliding_window") else None
    first = text.get("max_window_layers", 80)
    kinds = text.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, which is a linear layer on patches; names and shape are the hub's."""

    class Projection(nn.Module):
        def __init__(self, config: VisionConfig) -> None:
            super().__init__()
            self.weight = mx.zeros((config.embed_dim, *config.patch_shape))

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = self.Projection(config)

    def __call__(self, patches: mx.array) -> mx.array:
        weight = self.proj.weight  # [D, C, T, y, x]
        count, places, channels, height, width = patches.shape
        # A picture is a film of T equal frames.
        film = mx.broadcast_to(
            patches[:, :, :, None], (count, places, channels, weight.shape[2], height, width)
        )  # [n, P, C, T, y, x]
        return film.reshape(count, places, -1) @ weight.reshape(len(weight), -1).T


class VisionAttention(nn.Module):
    """Attention among all patches of one picture; q, k and v come from one projection."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)
        self._heads = config.num_heads
        self._scale = config.head_dim**-0.5

    def __call__(self, x: mx.array, rotate: Rotation) -> mx.array:
        queries, keys, values = (split_heads(part, self._heads) for part in mx.split(self.qkv(x), 3, axis=-1))
        mixed = mx.fast.scaled_dot_product_attention(rotate(queries), rotate(keys), values, scale=self._scale)
        return self.proj(join_heads(mixed))


class VisionBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=_VISION_EPS)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=_VISION_EPS)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config.embed_dim, int(config.embed_dim * config.mlp_ratio), config.hidden_act)

    def __call__(self, x: mx.array, rotate: Rotation) -> mx.array:
        x = x + self.attn(self.norm1(x), rotate)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Joins the patches of each block into one feature of the decoder's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.embed_dim * config.spatial_merge_size**2
        self.ln_q = nn.LayerNorm(config.embed_dim, eps=_VISION_EPS)
        self.mlp = [nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.hidden_size)]  # exact GELU, with erf
        self._width = width

    def __call__(self, x: mx.array) -> mx.array:
        x = self.ln_q(x).reshape(len(x), -1, self._width)  # [n, P, D] -> [n, N, merge * merge * D]
        for layer in self.mlp:
            x = layer(x)
        return x


def patch_coordinates(rows: int, columns: int, merge: int) -> NDArray[np.float32]:
    """[P, 2]: row and column of each patch, block by block as the processor orders them."""
    grid = np.indices((rows, columns), np.float32)  # [2, rows, columns]
    blocks = grid.reshape(2, rows // merge, merge, columns // merge, merge).transpose(1, 3, 2, 4, 0)
    return blocks.reshape(-1, 2)


class VisionTower(nn.Module):
    """Patches of pictures of one grid -> features, without resizing them to a common shape."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        self.blocks = [VisionBlock(config) for _ in range(config.depth)]
        self.merger = PatchMerger(config)
        # Half of the frequencies turn with the row, half with the column.
        axial = {"rope_type": "default", "rope_theta": config.rope_theta}
        self._inverse = mx.array(inverse_frequencies(config.head_dim // 2, axial))
        self._merge = config.spatial_merge_size

    def __call__(self, patches: mx.array, grid: tuple[int, int]) -> mx.array:
        coordinates = mx.array(patch_coordinates(*grid, self._merge))
        rotate = rotation((coordinates[..., None] * self._inverse).flatten(1))  # [P, 2, Dh / 4] -> [P, Dh / 2]
        x = self.patch_embed(patches)  # [n, P, C, y, x] -> [n, P, D]
        for block in self.blocks:
            x = block(x, rotate)
        return self.merger(x)  # [n, N, hidden_size]


def mrope_positions(prompt: Prompt, merge: int) -> tuple[NDArray[np.int32], int]:
    """int32 [3, L] positions in time, height and width, and how far the next token's is from its count.

    Text counts on all three axes. A picture stands still in time while its rows and columns count from where it starts;
    the text after it goes on after its longer side. Source: `Qwen2VLModel.get_rope_index`.
    """
    positions = np.tile(np.arange(len(prompt.token_ids), dtype=np.int32), (3, 1))
    delta = 0
    for image in prompt.images:
        start, end = image.span
        rows, columns = (side // merge for side in image.layout)
        positions[:, start:end] = start + delta + np.indices((1, rows, columns), np.int32).reshape(3, -1)
        saved = max(rows, columns) - rows * columns
        positions[:, end:] += saved
        delta += saved
    return positions, delta


class Model(DecoderModel):
    """A VisionLanguageModel."""

    quant_paths = QuantPaths(decoder="model", head="lm_head", tower="visual.blocks")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.visual = VisionTower(config.vision)
        self.model = Decoder(config.text)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self._config = config
        self._rope = MRoPE(config.text.head_dim, config.text.rope, config.mrope_section)

    @property
    def decoder(self) -> Decoder:
        return self.model

    @property
    def head(self) -> nn.Module | None:
        return None if self._config.tie_word_embeddings else self.lm_head

    @property
    def kv_specs(self) -> Sequence[KVSpec]:
        specs = zip(self._config.text.kv_specs, self._config.windows, strict=True)
        return [replace(spec, window=window) for spec, window in specs]

    def encode_images(self, images: Sequence[PreparedImage]) -> list[mx.array]:
        """[P, 3, side, side] patches of each image -> [P / merge^2, D]. Images of one grid go through together."""
        dtype = self.visual.merger.ln_q.weight.dtype
        features: dict[int, mx.array] = {}
        for grid in dict.fromkeys(image.layout for image in images):
            places = [index for index, image in enumerate(images) if image.layout == grid]
            patches = mx.array(np.stack([images[index].pixels for index in places])).astype(dtype)
            rows, columns = grid
            features.update(zip(places, self.visual(patches, (rows, columns)), strict=True))
        return [features[index] for index in range(len(images))]

    def embed_prompt(self, prompt: Prompt, features: Features) -> Inputs:
        embeds = self.model.embed(mx.array(prompt.token_ids)[None])
        if not prompt.images:
            return Inputs(embeds)
        positions, delta = mrope_positions(prompt, self._config.vision.spatial_merge_size)
        return Inputs(
            merge_features(embeds, prompt, self._config.image_token_id, features),
            positions=mx.array(positions)[:, None],  # [3, 1, L]
            rows=(RowState(position_delta=delta),),
        )

    def embed_tokens(self, token_ids: mx.array, rows: Sequence[RowState]) -> Inputs:
        return Inputs(self.model.embed(token_ids), rows=rows)

    def __call__(self, inputs: Inputs, cache: Sequence[Cache]) -> mx.array:
        hidden: mx.array = self.model(inputs.embeds, cache, self._rotation(inputs, cache[0].offset))
        return hidden

    def _rotation(self, inputs: Inputs, offset: int | mx.array) -> Rotation:
        if inputs.positions is not None:
            return self._rope.at_positions(inputs.positions)
        deltas = [row.position_delta for row in inputs.rows]
        if any(deltas):
            offset = offset + (deltas[0] if len(deltas) == 1 else mx.array(deltas))
        return self._rope.at(offset)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Hub names are ours; transformers 5 (in memory) and MLX-community put the parts under other prefixes."""
        ours = {
            renamed(name, _RENAMES): array
            for name, array in weights.items()
            if not name.endswith("rotary_emb.inv_freq")
        }
        if self._config.tie_word_embeddings:
            # Tied checkpoints may store the same matrix twice.
            ours = {name: array for name, array in ours.items() if not name.startswith("lm_head.")}
        kernel = ours.get(_KERNEL)
        channels, *rest = self._config.vision.patch_shape
        if kernel is not None and kernel.shape[1:] == (*rest, channels) != (channels, *rest):
            # MLX convolutions have the channels last; patches come with the channels first.
            ours[_KERNEL] = kernel.transpose(0, 4, 1, 2, 3)
        return ours

    def published(self, name: str, array: mx.array) -> tuple[str, mx.array]:
        if name == _KERNEL:
            array = array.transpose(0, 2, 3, 4, 1)
        return renamed(name, _PUBLISHED), array


_KERNEL = "visual.patch_embed.proj.weight"
_RENAMES = (
    # mlx-vlm puts the head inside the language model.
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    # transformers 5: model.language_model.*; mlx-vlm: language_model.model.*
    (re.compile(r"^(?:model\.language_model|language_model\.model)\."), "model."),
    # transformers 5: model.visual.*; mlx-vlm: vision_tower.*
    (re.compile(r"^(?:model\.visual|vision_tower)\."), "visual."),
)


_PUBLISHED = (
    (re.compile(r"^(model|lm_head)\."), r"language_model.\1."),
    (re.compile(r"^visual\."), "vision_tower."),
)


def build(config: Mapping[str, Any]) -> Model:
    """The entry that families.py points to."""
    return Model(Config.from_dict(config))
