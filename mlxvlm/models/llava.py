"""LLaVA 1.5 and LLaVA-NeXT: a CLIP or SigLIP tower, a two-layer projector and a Llama, Mistral or Qwen2 decoder.

Sources: Liu et al. 2024 (LLaVA 1.5, arXiv 2310.03744); LLaVA-NeXT (llava-vl.github.io/blog/2024-01-30-llava-next);
transformers `LlavaForConditionalGeneration`, `LlavaNextForConditionalGeneration`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxvlm.errors import UnsupportedModelError
from mlxvlm.models.base import (
    QuantPaths,
    check_numbers,
    is_buffer,
    renamed,
)
from mlxvlm.models.decoder import TEXT_TYPES, Decoder, DecoderConfig, DecoderModel
from mlxvlm.models.layers import activation
from mlxvlm.models.vit import Encoder, VisionConfig, to_channels_last
from mlxvlm.processors.base import PreparedImage

CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
# CLIPVisionConfig's and SiglipVisionConfig's, for what a vision_config leaves out.
VISION_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    CLIP: {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    SIGLIP: {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}
# LlavaConfig's own tower where there is no vision_config at all: CLIP-L/14 at 336 pixels.
DEFAULT_TOWER: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Config:
    """config.json."""

    text: DecoderConfig
    vision: VisionConfig
    has_class_token: bool  # CLIP's towers
    feature_layers: tuple[int, ...]  # hidden states that are projected: n is the output of n layers, 0 their input
    drops_first: bool  # vision_feature_select_strategy "default": without the class token
    is_anyres: bool  # LLaVA-NeXT: tiles, a newline after each row of patches
    image_token_id: int
    projector_act: str
    projector_bias: bool
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.image_token_id >= self.text.vocab_size:
            # MLX reads out of bounds without an error.
            raise ValueError(f"image_token_index {self.image_token_id} is outside the vocabulary")
        layers = self.vision.num_hidden_layers
        if not self.feature_layers or not all(0 <= layer <= layers for layer in self.feature_layers):
            raise ValueError(f"vision_feature_layer is none of the {layers + 1} hidden states")
        if self.is_anyres and self.has_class_token != self.drops_first:
            raise ValueError("vision_feature_select_strategy leaves features that are no grid of patches")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config:
        text = config.get("text_config") or {}
        if text.get("model_type", "llama") not in TEXT_TYPES:
            raise _unsupported("text_config", text["model_type"], TEXT_TYPES)
        tower = config.get("vision_config")
        tower = DEFAULT_TOWER if tower is None else tower
        kind = tower.get("model_type", CLIP)
        if kind not in VISION_DEFAULTS:
            raise _unsupported("vision_config", kind, VISION_DEFAULTS)
        vision = VisionConfig.from_dict(tower, VISION_DEFAULTS[kind])
        is_anyres = config.get("model_type") == "llava_next"
        tied = config.get("tie_word_embeddings", False)
        return cls(
            text=DecoderConfig.from_dict(text),
            vision=vision,
            has_class_token=kind == CLIP,
            feature_layers=_feature_layers(config.get("vision_feature_layer", -2), vision.num_hidden_layers),
            drops_first=config.get("vision_feature_select_strategy", "default") == "default",
            is_anyres=is_anyres,
            image_token_id=config.get("image_token_index", config.get("image_token_id", 32000)),
            projector_act=config.get("projector_hidden_act", "gelu"),
            projector_bias=config.get("multimodal_projector_bias", True),
            # LlavaConfig also heeds the text's own entry, where old releases wrote it; LlavaNextConfig does not.
            tie_word_embeddings=tied or (not is_anyres and text.get("tie_word_embeddings", False)),
        )


def _feature_layers(given: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Indices into the num_layers + 1 hidden states, counted from the front."""
    chosen = [given] if isinstance(given, int) else given
    return tuple(layer if layer >= 0 else num_layers + 1 + layer for layer in chosen)


def _unsupported(part: str, kind: Any, known: Mapping[str, Any]) -> UnsupportedModelError:
    return UnsupportedModelError(f"{part}'s model_type {kind!r} is not supported; supported: {', '.join(known)}")


class VisionEmbeddings(nn.Module):
    """Patch convolution, CLIP's class token before the patches, a learned position for each."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        vision, has_class = config.vision, config.has_class_token
        self.patch_embedding = nn.Conv2d(
            vision.num_channels,
            vision.hidden_size,
            kernel_size=vision.patch_size,
            stride=vision.patch_size,
            bias=not has_class,
        )
        if has_class:
            self.class_embedding = mx.zeros((vision.hidden_size,))
        self.position_embedding = nn.Embedding(vision.grid**2 + has_class, vision.hidden_size)
        self._has_class = has_class

    def __call__(self, pixels: mx.array) -> mx.array:
        x = self.patch_embedding(pixels).flatten(1, 2)  # [F, H, W, C] -> [F, P, D]
        if self._has_class:
            first = mx.broadcast_to(self.class_embedding, (x.shape[0], 1, x.shape[2]))
            x = mx.concatenate([first, x], axis=1)  # [F, 1 + P, D]
        # Quantised embeddings may answer in another dtype.
        return x + self.position_embedding(mx.arange(x.shape[1])).astype(x.dtype)


class VisionModel(nn.Module):
    """CLIP or SigLIP up to the last hidden state that is projected."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        if config.has_class_token:
            self.pre_layrnorm = nn.LayerNorm(config.vision.hidden_size, eps=config.vision.layer_norm_eps)  # sic
        self.encoder = Encoder(config.vision, max(config.feature_layers))
        self._config = config

    @property
    def dtype(self) -> mx.Dtype:
        """What pixels are cast to: the convolution is never quantised."""
        return self.embeddings.patch_embedding.weight.dtype

    def __call__(self, pixels: mx.array) -> mx.array:
        config = self._config
        x = self.embeddings(pixels)
        if config.has_class_token:
            x = self.pre_layrnorm(x)
        chosen = {0: x}
        for number, layer in enumerate(self.encoder.layers, start=1):
            x = layer(x)
            if number in config.feature_layers:
                chosen[number] = x
        features = mx.concatenate([chosen[number] for number in config.feature_layers], axis=-1)
        return features[:, 1:] if config.drops_first else features  # [F, N, layers * D]


class VisionTower(nn.Module):
    """Named as in the checkpoint."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.vision_model = VisionModel(config)


class Projector(nn.Module):
    """linear_2(act(linear_1(x))), from the tower's width to the text's."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, bias = config.text.hidden_size, config.projector_bias
        self.linear_1 = nn.Linear(config.vision.hidden_size * len(config.feature_layers), width, bias=bias)
        self.linear_2 = nn.Linear(width, width, bias=bias)
        self._act = activation(config.projector_act)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_2(self._act(self.linear_1(x)))


class LanguageModel(nn.Module):
    """The decoder and its head, named as in the checkpoint."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model = Decoder(config.text)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)


def pack_tiles(features: mx.array, layout: Sequence[int], newline: mx.array) -> mx.array:
    """[1 + rows * columns, side * side, D] of a whole view and its tiles -> [N, D].

    The whole view first; then the tiles laid out as one grid of patches, the padding trimmed off, a newline after each
    of its rows. Source: `LlavaNextModel.pack_image_features`.
    """
    rows, columns, trim_y, trim_x = layout
    _, patches, dims = features.shape
    side = int(patches**0.5)
    height, width = rows * side, columns * side
    tiles = features[1:].reshape(rows, columns, side, side, dims).transpose(0, 2, 1, 3, 4)
    grid = tiles.reshape(height, width, dims)[trim_y : height - trim_y, trim_x : width - trim_x]
    ends = mx.broadcast_to(newline, (grid.shape[0], 1, dims))
    lines = mx.concatenate([grid, ends], axis=1).reshape(-1, dims)
    return mx.concatenate([features[0], lines])


class Model(DecoderModel):
    """A VisionLanguageModel."""

    quant_paths = QuantPaths(
        decoder="language_model.model",
        head="language_model.lm_head",
        tower="vision_tower.vision_model.encoder.layers",
    )

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.vision_tower = VisionTower(config)
        self.multi_modal_projector = Projector(config)
        if config.is_anyres:
            self.image_newline = mx.zeros((config.text.hidden_size,))
        self.language_model = LanguageModel(config)
        self._config = config

    @property
    def decoder(self) -> Decoder:
        return self.language_model.model

    @property
    def head(self) -> nn.Module | None:
        return None if self._config.tie_word_embeddings else self.language_model.lm_head

    def encode_images(self, images: Sequence[PreparedImage]) -> list[mx.array]:
        """[frames, 3, side, side] pixels of each image -> [N, D]."""
        counts = [len(image.pixels) for image in images]
        frames = mx.array(np.concatenate([image.pixels for image in images]).transpose(0, 2, 3, 1))
        tower = self.vision_tower.vision_model
        features = self.multi_modal_projector(tower(frames.astype(tower.dtype)))  # [F, N, D]
        pieces = mx.split(features, np.cumsum(counts)[:-1].tolist())
        if not self._config.is_anyres:
            return [piece[0] for piece in pieces]
        newline = self.image_newline.astype(features.dtype)
        return [pack_tiles(piece, image.layout, newline) for piece, image in zip(pieces, images, strict=True)]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Hub and MLX-community names are ours; transformers 5 has others for the same tensors."""
        named = {renamed(name, _RENAMES): array for name, array in weights.items()}
        if self._config.tie_word_embeddings:
            # Tied checkpoints may store the same matrix twice.
            named = {name: array for name, array in named.items() if not name.startswith("language_model.lm_head.")}
        conv = f"{_TOWER}embeddings.patch_embedding.weight"
        if conv in named:
            named[conv] = to_channels_last(named[conv], self._config.vision.num_channels)
        return {name: array for name, array in named.items() if not (is_buffer(name) or self._is_unused(name))}

    def _is_unused(self, name: str) -> bool:
        """What a tower stores beyond the last hidden state that is projected.

        Dropped rather than bound: with the usual feature layer -2 it is 4 % of the tower, which no answer needs.
        """
        layer = re.match(re.escape(f"{_TOWER}encoder.layers.") + r"(\d+)\.", name)
        if layer:
            # Layers that the config does not know stay, and are refused by name.
            return max(self._config.feature_layers) <= int(layer[1]) < self._config.vision.num_hidden_layers
        return name.startswith((f"{_TOWER}post_layernorm.", f"{_TOWER}head."))

    def published(self, name: str, array: mx.array) -> tuple[str, mx.array]:
        return name, array


_TOWER = "vision_tower.vision_model."
_RENAMES = (
    # transformers 5 in memory: everything but the head under `model.`, the head outside the language model.
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^model\.language_model\.(?:model\.)?"), "language_model.model."),
    (re.compile(r"^model\.(multi_modal_projector\.|image_newline$)"), r"\1"),
    # transformers 5 has no `vision_model.` in towers, and drops it when it saves.
    (re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?"), _TOWER),
)


def build(config: Mapping[str, Any]) -> Model:
    """The entry that families.py points to."""
    return Model(Config.from_dict(config))
