"""Idefics3 and SmolVLM: a SigLIP tower, pixel shuffle, one linear connector and a Llama decoder.

Sources: Laurençon et al. 2024 (arXiv 2408.12637); Marafioti et al. 2025 (arXiv 2504.05299); transformers
`Idefics3ForConditionalGeneration`, `SmolVLMForConditionalGeneration` (the same arithmetic).
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
    QuantPaths,
    check_numbers,
    is_buffer,
    renamed,
)
from mlxvlm.models.decoder import Decoder, DecoderConfig, DecoderModel
from mlxvlm.models.vit import Encoder, VisionConfig, pixel_shuffle, to_channels_last
from mlxvlm.processors.base import PreparedImage

# Idefics3VisionConfig's, for what a vision_config leaves out.
VISION_DEFAULTS = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


@dataclass(frozen=True)
class Config:
    """config.json."""

    text: DecoderConfig
    vision: VisionConfig
    image_token_id: int
    scale_factor: int
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.vision.grid % self.scale_factor:
            raise ValueError(f"{self.vision.grid} patches a side can't be shuffled by scale_factor {self.scale_factor}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config:
        text = config.get("text_config")
        return cls(
            # The reference's own default text config has another eps than a partial one, be it empty.
            text=DecoderConfig.from_dict({"rms_norm_eps": 1e-5} if text is None else text),
            vision=VisionConfig.from_dict(config.get("vision_config") or {}, VISION_DEFAULTS),
            image_token_id=config.get("image_token_id", 128257),
            scale_factor=config.get("scale_factor", 2),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
        )


def position_buckets(count: int, grid: int) -> NDArray[np.int32]:
    """[count]: which of `grid` learned positions each of `count` patches on one axis takes.

    The reference buckets i / count in float32. For every published grid (16, 24, 26, 27, 32, 36) that is exactly the
    integer quotient; for ten other pairs up to 40 (19, 25, 29 ...) its rounding depends on the width of the CPU's
    vectors, so that there is nothing to follow. Source: `Idefics3VisionEmbeddings.forward`.
    """
    return (np.arange(count, dtype=np.int32) * grid) // count


class VisionEmbeddings(nn.Module):
    """Patch convolution plus a learned position for each cell of the grid."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(config.grid**2, config.hidden_size)
        self._grid = config.grid

    def __call__(self, pixels: mx.array) -> mx.array:
        patches = self.patch_embedding(pixels)  # [F, h, w, D]
        _, height, width, dims = patches.shape
        rows, columns = (position_buckets(count, self._grid) for count in (height, width))
        positions = mx.array(rows[:, None] * self._grid + columns[None, :]).flatten()
        # Quantised embeddings may answer in another dtype.
        embedded = self.position_embedding(positions).astype(patches.dtype)
        return patches.reshape(-1, height * width, dims) + embedded


class VisionModel(nn.Module):
    """SigLIP without its pooling head."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, pixels: mx.array) -> mx.array:
        x = self.embeddings(pixels)  # [F, H, W, C] -> [F, P, D]
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class ModalityProjection(nn.Module):
    """One linear layer, named as in the checkpoint."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dims = config.vision.hidden_size * config.scale_factor**2
        self.proj = nn.Linear(dims, config.text.hidden_size, bias=False)


class Connector(nn.Module):
    """Pixel shuffle, then projection to the text width."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.modality_projection = ModalityProjection(config)
        self._scale = config.scale_factor

    def __call__(self, x: mx.array) -> mx.array:
        return self.modality_projection.proj(pixel_shuffle(x, self._scale))  # [F, N, D]


class Backbone(nn.Module):
    """The three parts under the checkpoint's `model.` prefix."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.vision_model = VisionModel(config.vision)
        self.connector = Connector(config)
        self.text_model = Decoder(config.text)


class Model(DecoderModel):
    """A VisionLanguageModel."""

    quant_paths = QuantPaths(decoder="model.text_model", head="lm_head", tower="model.vision_model.encoder.layers")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self._config = config

    @property
    def decoder(self) -> Decoder:
        return self.model.text_model

    @property
    def head(self) -> nn.Module | None:
        return None if self._config.tie_word_embeddings else self.lm_head

    def encode_images(self, images: Sequence[PreparedImage]) -> list[mx.array]:
        """[frames, 3, side, side] pixels of each image -> [frames * tokens a frame, D]."""
        counts = [len(image.pixels) for image in images]
        frames = mx.array(np.concatenate([image.pixels for image in images]).transpose(0, 2, 3, 1))
        tower = self.model.vision_model
        features = self.model.connector(tower(frames.astype(tower.post_layernorm.weight.dtype)))
        pieces = mx.split(features, np.cumsum(counts)[:-1].tolist())
        return [piece.reshape(-1, piece.shape[-1]) for piece in pieces]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Hub and transformers 5 names are ours; MLX-community ones lack the `model.` prefix."""
        named = {renamed(name, _RENAMES): array for name, array in weights.items()}
        if self._config.tie_word_embeddings:
            # Tied checkpoints may store the same matrix twice.
            named = {name: array for name, array in named.items() if not name.startswith("lm_head.")}
        conv = "model.vision_model.embeddings.patch_embedding.weight"
        if conv in named:
            named[conv] = to_channels_last(named[conv], self._config.vision.num_channels)
        return {name: array for name, array in named.items() if not is_buffer(name)}

    def published(self, name: str, array: mx.array) -> tuple[str, mx.array]:
        return renamed(name, _PUBLISHED), array


_RENAMES = (
    # mlx-vlm puts the head inside the language model and drops the decoder's own `model.`.
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.(?:model\.)?"), "model.text_model."),
    (re.compile(r"^(vision_model|connector)\."), r"model.\1."),
)


_PUBLISHED = (
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^model\.text_model\."), "language_model."),
    (re.compile(r"^model\.(vision_model|connector)\."), r"\1."),
)


def build(config: Mapping[str, Any]) -> Model:
    """The entry that families.py points to."""
    return Model(Config.from_dict(config))
