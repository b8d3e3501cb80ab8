"""Llama, Mistral and Qwen2 without pictures: the shared decoder and its head.

Sources: transformers `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxvlm.models.base import Cache, Features, Inputs, KVSpec, QuantPaths, RowState, images_from, is_buffer
from mlxvlm.models.decoder import Decoder, DecoderConfig
from mlxvlm.processors.base import PreparedImage, Prompt


@dataclass(frozen=True)
class Config:
    """config.json."""

    text: DecoderConfig
    tie_word_embeddings: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config:
        return cls(DecoderConfig.from_dict(config), bool(config.get("tie_word_embeddings", False)))


class Model(nn.Module):
    """A VisionLanguageModel that sees nothing."""

    quant_paths = QuantPaths(decoder="model", head="lm_head", tower="")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model = Decoder(config.text)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self._config = config

    @property
    def kv_specs(self) -> list[KVSpec]:
        return self._config.text.kv_specs

    @property
    def vocab_size(self) -> int:
        return self._config.text.vocab_size

    def encode_images(self, images: Sequence[PreparedImage]) -> list[mx.array]:
        """Never called with pictures: the processor refuses them."""
        if images:
            raise ValueError("a model without a vision tower can't encode images")
        return []

    def needed_images(self, prompt: Prompt, start: int) -> Sequence[int]:
        return images_from(prompt, start)

    def embed_prompt(self, prompt: Prompt, features: Features) -> Inputs:
        return Inputs(self.model.embed(mx.array(prompt.token_ids)[None]))

    def embed_tokens(self, token_ids: mx.array, rows: Sequence[RowState]) -> Inputs:
        return Inputs(self.model.embed(token_ids))

    def __call__(self, inputs: Inputs, cache: Sequence[Cache]) -> mx.array:
        hidden: mx.array = self.model(inputs.embeds, cache)
        return hidden

    def logits(self, hidden: mx.array) -> mx.array:
        if self._config.tie_word_embeddings:
            tied: mx.array = self.model.embed_tokens.as_linear(hidden)
            return tied
        head: mx.array = self.lm_head(hidden)
        return head

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
