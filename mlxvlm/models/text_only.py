"""Llama, Mistral and Qwen2 without pictures: the shared decoder and its head.

Sources: transformers `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxvlm.models.base import QuantPaths, is_buffer
from mlxvlm.models.decoder import Decoder, DecoderConfig, DecoderModel
from mlxvlm.processors.base import PreparedImage


@dataclass(frozen=True)
class Config:
    """config.json."""

    text: DecoderConfig
    tie_word_embeddings: bool
    image_token_id: int = -1  # no token's

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config:
        return cls(DecoderConfig.from_dict(config), bool(config.get("tie_word_embeddings", False)))


class Model(DecoderModel):
    """A VisionLanguageModel that sees nothing."""

    quant_paths = QuantPaths(decoder="model", head="lm_head", tower="")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model = Decoder(config.text)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self._config = config

    @property
    def decoder(self) -> Decoder:
        return self.model

    @property
    def head(self) -> nn.Module | None:
        return None if self._config.tie_word_embeddings else self.lm_head

    def encode_images(self, images: Sequence[PreparedImage]) -> list[mx.array]:
        """Never called with pictures: the processor refuses them."""
        if images:
            raise ValueError("a model without a vision tower can't encode images")
        return []

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Hub and MLX-community names are ours; tied checkpoints may store the same matrix twice."""
        tied = self._config.tie_word_embeddings
        return {
            name: array
            for name, array in weights.items()
            if not is_buffer(name) and not (tied and name.startswith("lm_head."))
        }

    def published(self, name: str, array: mx.array) -> tuple[str, mx.array]:
        return name, array


def build(config: Mapping[str, Any]) -> Model:
    """The entry that families.py points to."""
    return Model(Config.from_dict(config))
