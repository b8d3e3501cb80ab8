"""One rank's part of a model that several run together. Knows tensors and who has them, not requests or sockets.

Rank 0 alone embeds and sees pictures. Where it gives tensors, the others add zeros: the sum over all ranks is what it
gave, in one collective of MLX's that every backend has. Each method is called by all ranks in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxvlm.models.base import Cache, Features, Inputs, KVSpec, QuantPaths, RowState, VisionLanguageModel
from mlxvlm.models.shares import Rank
from mlxvlm.processors.base import PreparedImage, Prompt


class Shard:
    """A VisionLanguageModel of a narrowed one (shares.narrow); ranks after the first have decoder layers and head."""

    def __init__(self, model: VisionLanguageModel, rank: Rank, group: mx.distributed.Group) -> None:
        assert isinstance(model, nn.Module)
        self.model: Any = model
        self.rank = rank
        self._group = group
        self.quant_paths: QuantPaths = model.quant_paths
        modules = dict(model.named_modules())
        self._has_head = self.quant_paths.head in modules
        norm: Any = modules[f"{self.quant_paths.decoder}.norm"]
        self._hidden, self._dtype = norm.weight.shape[0], norm.weight.dtype
        kv_heads = next(
            module._kv_heads
            for path, module in modules.items()
            if path.startswith(f"{self.quant_paths.decoder}.layers.") and path.endswith(".self_attn")
        )
        self.kv_specs: Sequence[KVSpec] = [replace(spec, num_kv_heads=kv_heads) for spec in model.kv_specs]
        self.vocab_size = model.vocab_size
        if hasattr(model, "_share"):
            model._share = self._given

    def encode_images(self, images: Sequence[PreparedImage]) -> list[mx.array]:
        """Rank 0 only."""
        features: list[mx.array] = self.model.encode_images(images)
        return features

    def needed_images(self, prompt: Prompt, start: int) -> Sequence[int]:
        needed: Sequence[int] = self.model.needed_images(prompt, start)
        return needed

    def state_bytes(self, prompt: Prompt) -> int:
        """Of a row's arrays beside its keys and values."""
        return int(self.model.state_bytes(prompt)) if hasattr(self.model, "state_bytes") else 0

    def embed_prompt(self, prompt: Prompt, features: Features) -> Inputs:
        """Rank 0 only; shared() must follow on all ranks."""
        inputs: Inputs = self.model.embed_prompt(prompt, features)
        return inputs

    def outline(self, inputs: Inputs) -> dict[str, Any]:
        """What others must know of a prompt's inputs before shared(), in JSON's types."""
        state = inputs.rows[0] if inputs.rows else RowState()
        vision = state.vision
        return {
            "length": inputs.embeds.shape[1],
            "delta": state.position_delta,
            "has_positions": inputs.positions is not None,
            "pictures": 0 if inputs.sees is None else inputs.sees.shape[-1],
            "vision": None if vision is None else {"sizes": list(vision.sizes), "tail": vision.tail},
        }

    def unfilled(self, outline: Mapping[str, Any]) -> Inputs:
        """Zeros in the place of a prompt's inputs."""
        length, pictures, vision = outline["length"], outline["pictures"], outline["vision"]
        state = RowState(outline["delta"])
        if vision is not None:
            states = _zeros((1, sum(vision["sizes"]), self._hidden), self._dtype)
            made: RowState = self.model.row_state(states, vision["sizes"], vision["tail"])
            state = replace(made, position_delta=state.position_delta)
        return Inputs(
            _zeros((1, length, self._hidden), self._dtype),
            _zeros((3, 1, length), mx.int32) if outline["has_positions"] else None,
            _zeros((1, length, pictures), mx.bool_) if pictures else None,
            (state,),
        )

    def shared(self, inputs: Inputs) -> Inputs:
        """Rank 0's on all ranks, but for the embeddings, which come with each pass."""
        # One after the other: within one evaluation their order might differ between ranks.
        positions = None if inputs.positions is None else self._given(inputs.positions)
        mx.eval(positions)
        sees = None if inputs.sees is None else self._given(inputs.sees.astype(mx.int32)).astype(mx.bool_)
        mx.eval(sees)
        for row in inputs.rows:
            if row.vision is not None:
                mx.eval(row.vision.keys, row.vision.values)
        return replace(inputs, positions=positions, sees=sees)

    def embed_tokens(self, token_ids: mx.array, rows: Sequence[RowState]) -> Inputs:
        """Of ranks after the first only the shape of the ids counts."""
        if self.rank.index:
            return Inputs(_zeros((*token_ids.shape, self._hidden), self._dtype), rows=rows)
        inputs: Inputs = self.model.embed_tokens(token_ids, rows)
        return inputs

    def __call__(self, inputs: Inputs, cache: Sequence[Cache]) -> mx.array:
        hidden: mx.array = self.model(replace(inputs, embeds=self._given(inputs.embeds)), cache)
        return hidden

    def logits(self, hidden: mx.array) -> mx.array:
        """[N, D] -> [N, V]; where embeddings serve as head, only rank 0 has it, and others get what they gave."""
        if not self._has_head:
            return hidden if self.rank.index else self._logits(hidden)
        ranks = [Rank(index, self.rank.count) for index in range(self.rank.count)]
        sizes = [len(each.range(self.vocab_size)) for each in ranks]
        part = self._logits(hidden)
        padded = mx.pad(part, [(0, 0), (0, max(sizes) - part.shape[-1])])  # a gathering wants equal shapes
        parts = mx.distributed.all_gather(padded, group=self._group).reshape(len(sizes), *padded.shape)
        return mx.concatenate([parts[index, :, :size] for index, size in enumerate(sizes)], axis=-1)

    def _logits(self, hidden: mx.array) -> mx.array:
        logits: mx.array = self.model.logits(hidden)
        return logits

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        ours: dict[str, mx.array] = self.model.sanitize(weights)
        return ours

    def published(self, name: str, array: mx.array) -> tuple[str, mx.array]:
        published: tuple[str, mx.array] = self.model.published(name, array)
        return published

    def _given(self, array: mx.array) -> mx.array:
        return mx.distributed.all_sum(array, group=self._group)


def _zeros(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """A view of one zero: a slice of it takes no more than its own size."""
    return mx.broadcast_to(mx.zeros((), dtype), shape)
